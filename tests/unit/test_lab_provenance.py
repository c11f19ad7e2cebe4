"""The commit and the uncommitted changes that a run directory records."""

import json
import subprocess
from pathlib import Path

import pytest
from lab_runs import start_and_end

from megatron_rl.lab import provenance, run_records


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return package / "__init__.py"


def test_git_state_tells_a_clean_from_a_changed_checkout(checkout: Path) -> None:
    clean = provenance.git_state(checkout)
    assert clean is not None
    assert len(clean.commit) == 40
    assert not clean.dirty
    checkout.write_text("a = 2\n")
    (checkout.parent / "new.py").write_text("")
    dirty = provenance.git_state(checkout)
    assert dirty is not None
    assert dirty.commit == clean.commit
    assert dirty.dirty
    assert "-a = 1\n+a = 2\n" in dirty.diff
    assert dirty.untracked == ("package/new.py",)


def test_a_package_installed_below_a_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / "site-packages" / "__init__.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert provenance.git_state(installed) is None


def test_git_records_are_written_with_the_diff(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.write_text("a = 2\n")
    monkeypatch.setattr(run_records.megatron_rl, "__file__", str(checkout))
    start_and_end(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "git.json").read_text())
    assert state["dirty"] is True
    assert "+a = 2" in (tmp_path / "run" / "git.diff").read_text()
