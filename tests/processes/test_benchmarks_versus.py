"""Two trainers that train in turn: each makes as many steps as it is granted, and then stands still."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from paths import ROOT

TRAINER = """
import sys
from pathlib import Path
from versus.turns import Turns

turns = Turns.within(Path(sys.argv[1]))
for step in range(1, 4):
    if step == int(sys.argv[2]):
        sys.exit("out of memory")
    turns.step_done({"seconds": {"update": float(step)}})
"""


def side(monkeypatch: pytest.MonkeyPatch, directory: Path, fails_at: int = 0) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    command = [sys.executable, "-c", TRAINER, str(directory), str(fails_at)]
    return importlib.import_module("versus.side").Side("mine", command, directory, threads=1)


def test_a_trainer_makes_the_granted_steps_and_stands_still_between_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = side(monkeypatch, tmp_path / "mine")
    mine.start()
    try:
        mine.step_to(1)
        assert len(mine.turns.done()) == 1
        deadline = time.monotonic() + 30.0
        while mine.process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mine.block(3)
        assert len(mine.turns.done()) == 3
        mine.finish()
    finally:
        mine.kill()
    assert len(mine.block_seconds) == len(mine.block_core_seconds) == 1
    assert mine.phases() == {"update": 2.5}  # without the first step


def test_a_trainer_that_ends_early_is_an_error_with_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = side(monkeypatch, tmp_path / "mine", fails_at=2)
    mine.start()
    try:
        mine.step_to(1)
        with pytest.raises(SystemExit, match=r"(?s)mine ended with status 1.*out of memory"):
            mine.step_to(2)
    finally:
        mine.kill()
