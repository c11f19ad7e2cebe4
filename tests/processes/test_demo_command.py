"""`megatron-rl demo` before it trains: what it refuses, and how it ends if one of its commands fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_rl.cli import app
from megatron_rl.demo import first_run
from megatron_rl.errors import UserError


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("override", ["run_dir=runs/a", "model.path=models/a"])
def test_keys_that_the_demo_chooses_are_refused_before_anything_is_made(empty: Path, override: str) -> None:
    (empty / ".demo" / "cold-start").mkdir(parents=True)
    with pytest.raises(
        UserError, match=rf"^override '{override}': the demo chooses its own; start `megatron-rl train`"
    ):
        app(["demo", "train.steps=1", override], standalone_mode=False)
    assert [path.name for path in empty.rglob("*")] == [".demo", "cold-start"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_device_that_is_found_is_the_one_that_counts(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang is installed for CPUs here."""
    (empty / ".demo" / "cold-start").mkdir(parents=True)
    begun: list[tuple[str, ...]] = []
    monkeypatch.setattr(first_run, "train", lambda preset, overrides: begun.append((preset, *overrides)))
    app(["demo", "engine.device=auto"], standalone_mode=False)
    assert begun == [("gspo", "engine.device=auto")]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started."""
    monkeypatch.setattr(first_run, "run", lambda *command: pytest.fail(f"started {command}"))


def test_a_mistake_in_an_override_is_told_before_the_cold_start(empty: Path, idle: None) -> None:
    with pytest.raises(UserError, match=r"train\.stepss"):
        app(["demo", "train.stepss=1"], standalone_mode=False)
    assert list(empty.iterdir()) == []


def test_without_sglang_the_cold_start_is_not_begun(empty: Path, idle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(UserError, match=r"sglang is not installed here; install the extra \[sglang\]"):
        app(["demo"], standalone_mode=False)
    assert list(empty.iterdir()) == []


def test_an_unknown_preset_is_answered_with_all(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["demo", "--preset", "base"])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "found 'base', expected one of cispo, dapo, dr_grpo" in told
    assert list(empty.iterdir()) == []


def test_a_cold_start_that_is_there_is_kept(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / ".demo" / "cold-start").mkdir(parents=True)
    app(["demo", "--cold-start"], standalone_mode=False)
    assert capsys.readouterr().out == "cold start: .demo/cold-start is there already\n"


def test_the_demo_ends_with_the_status_of_the_command_that_failed() -> None:
    with pytest.raises(SystemExit) as ended:
        first_run.run("-c", "raise SystemExit(75)")
    assert ended.value.code == 75
    first_run.run("-c", "")
