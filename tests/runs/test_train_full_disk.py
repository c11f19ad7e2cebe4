"""Real runs on a full disk: no checkpoint is lost, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from resume_runs import SFT, assert_like_whole, assert_refused, contents, read_steps, wait_for
from small_disk import small_disk


@pytest.fixture(name="small_disk")
def two_mebibytes(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as disk:
        yield disk


def fill(disk: Path, leave: int) -> Path:
    """Fills the disk until `leave` bytes are free."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(b"\0" * max(0, free - leave))
    return ballast


@pytest.mark.parametrize("leave", [100_000, 4096, 0])
def test_a_full_disk_loses_no_checkpoint(forks: Forks, setting: Path, small_disk: Path, leave: int) -> None:
    """Leaves room for a part of a checkpoint, for some lines, or for nothing."""
    run_dir = small_disk / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}")
    run = forks.start(*arguments, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    ballast = fill(small_disk, leave)
    assert_refused(forks.wait(run), "was not written: ", "no space left on device", "free")
    assert read_steps(run_dir) == [1]
    if leave == 100_000:
        assert "the checkpoint of step-000002 was not written" in run.stderr
        assert "step-000001 (" in run.stderr
        assert not list((run_dir / "checkpoints").glob("*.partial"))
    before = contents(run_dir)
    if leave == 0:
        assert_refused(forks.run(*arguments, "--resume"), "was not written: ", "no space left on device")
        assert contents(run_dir) == before
    ballast.unlink()
    run = forks.run(*arguments, "checkpoint.keep=1", "--resume")
    assert run.status == [0], run.stderr
    assert_like_whole(setting, run_dir)


@pytest.mark.distributed
def test_all_ranks_end_on_a_full_disk(forks: Forks, setting: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    run = forks.start(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", ranks=2, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    fill(small_disk, 60_000)
    forks.wait(run)
    assert run.status == [2, 2], run.stderr
    assert "no space left on device" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_failed_model_export_is_reported_and_done_on_resume(forks: Forks, setting: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "steps=2")
    run = forks.start(*arguments, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    first = run_dir / "checkpoints" / "step-000001"
    while not first.is_dir():  # pytest's timeout ends it
        time.sleep(0.05)
    one = sum(file.stat().st_size for file in first.iterdir())
    ballast = fill(small_disk, one + 40_000)
    assert_refused(forks.wait(run), "the model in", "was not written: ", "no space left on device")
    assert read_steps(run_dir) == [1, 2]
    ballast.unlink()
    assert forks.run(*arguments, "--resume").status == [0]
    assert (run_dir / "model" / "model.safetensors").exists()
