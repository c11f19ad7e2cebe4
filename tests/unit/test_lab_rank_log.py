"""What a rank logs: libraries' warnings go to its file, and the console has this program's warnings and all errors."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.lab.rank_log import RankLog, log_file

ours, theirs = logging.getLogger("megatron_rl.lab.some"), logging.getLogger("transformers.some")


@pytest.fixture(autouse=True)
def default_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])


def speak() -> None:
    ours.info("step 1")
    ours.warning("ejected; %d others", 3)
    theirs.warning("deprecated")
    theirs.error("lost the file")
    warnings.warn("a library's advice", UserWarning, stacklevel=1)


def test_the_file_has_all_and_the_console_what_concerns_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    library = logging.getLogger("transformers")
    library.addHandler(own := logging.StreamHandler(sys.stderr))
    library.propagate, before = False, [*library.handlers]
    try:
        with warnings.catch_warnings(), RankLog(3, heard.append) as log:
            warnings.simplefilter("always")
            speak()
            assert not log_file(tmp_path, 3).exists()
            log.open(tmp_path)
            ours.info("step 2")
        assert library.handlers == before
        assert not library.propagate
    finally:
        library.removeHandler(own)
        library.propagate = True
    lines = log_file(tmp_path, 3).read_text().splitlines()
    ends = ("some: step 1", "ejected; 3 others", "deprecated", "lost the file", "UserWarning: a library's advice")
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=False))
    assert lines[-1].endswith("INFO megatron_rl.lab.some: step 2")
    assert all(line.startswith("20") for line in (lines[0], lines[-1]))
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning (rank 3): ejected; 3 others", "warning (rank 3): lost the file"]
    assert heard == ["ejected; 3 others", "lost the file"]


def test_a_fault_before_the_run_began_prints_what_waited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        with RankLog(0):
            theirs.warning("deprecated")
            raise error

    with pytest.raises(RuntimeError):
        fail(RuntimeError())
    assert "deprecated" in capsys.readouterr().err
    with pytest.raises(UserError):
        fail(UserError())
    assert capsys.readouterr().err == ""


def test_the_file_has_the_traceback_of_a_fault(tmp_path: Path) -> None:
    def fail() -> None:
        with RankLog(0) as log:
            log.open(tmp_path)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        fail()
    assert log_file(tmp_path, 0).read_text().endswith("RuntimeError: broken\n")


def test_python_s_warnings_go_where_the_user_sent_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    shown = warnings.showwarning
    with RankLog(0):
        assert warnings.showwarning is shown
