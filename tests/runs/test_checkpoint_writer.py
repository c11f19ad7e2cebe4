"""Checkpoints are written while the run goes on, and are of the step that began them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import Forks, Run
from resume_runs import SFT, assert_like_whole, resume

from megatron_rl import disk
from megatron_rl.engine.checkpoint_writer import Shard
from megatron_rl.lab.run import read_metrics


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def wait_for_steps(forks: Forks, run: Run, run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline
        assert forks.poll(run), run.stderr
        time.sleep(0.01)


def test_an_optimizer_waits_for_the_copy_of_what_it_will_change(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = (f"run_dir={run_dir}", "checkpoint.every=2")
    run = forks.start(*SFT, setting / "sft.yaml", *options, before=[("patches:slow_copies", 0.02)])
    wait_for_steps(forks, run, run_dir, 4)  # the fourth begins the second checkpoint, which waits for the first
    deadline = time.monotonic() + 60
    while "step-000002" not in saved(run_dir) and time.monotonic() < deadline and forks.poll(run):
        time.sleep(0.01)
    forks.kill(run)
    forks.wait(run)
    assert "step-000002" in saved(run_dir)
    assert resume(forks, setting, run_dir, "checkpoint.every=1").status == [0]
    assert_like_whole(setting, run_dir)


def test_the_next_step_does_not_wait_for_the_file_and_a_kill_leaves_the_checkpoint_before(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    before = [("patches:slow_files", 600.0)]
    run = forks.start(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", before=before)
    wait_for_steps(forks, run, run_dir, 3)
    forks.kill(run)
    forks.wait(run)
    assert saved(run_dir) == ["step-000001", "step-000002.partial"]
    (line,) = read_metrics(run_dir / "checkpoints.jsonl")
    assert line["step"] == 1
    assert line["time/checkpoint_write"] > 0
    assert resume(forks, setting, run_dir).status == [0]
    assert_like_whole(setting, run_dir)


def test_a_rank_needs_nothing_of_the_directory_once_its_receipt_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 renames the directory as soon as it sees the last receipt."""
    partial = tmp_path / "step-000001.partial"
    partial.mkdir()
    replace = os.replace

    def as_rank_0_does(source: Path, target: Path) -> None:
        replace(source, target)
        replace(partial, tmp_path / "step-000001")

    monkeypatch.setattr(disk.os, "replace", as_rank_0_does)
    Shard(partial, 1, {"weight": torch.zeros(3)}, {}, lambda: None).write(threading.Event())
    found = sorted(path.name for path in (tmp_path / "step-000001").iterdir())
    assert found == ["rank-00001.json", "rank-00001.safetensors"]


@pytest.mark.distributed
def test_a_run_that_fails_completes_its_checkpoint(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """The slow rank is not the one that completes it."""
    run_dir = tmp_path / "run"
    before = [("patches:slow_files", 1.0, 1), ("patches:fails_in_step", 3)]
    run = forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", ranks=2, before=before)
    assert run.status == [2, 2], run.stderr
    assert "step 3 fails" in run.stderr
    assert saved(run_dir) == ["step-000001", "step-000002"]
    files = sorted(path.name for path in (run_dir / "checkpoints" / "step-000002").iterdir())
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


@pytest.mark.distributed
def test_all_ranks_end_in_the_step_in_which_one_of_them_could_not_write(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = (f"run_dir={run_dir}", "checkpoint.every=2")
    before = [("patches:slow_files", 0.0, 1, "the disk is broken"), ("patches:slow_steps", 1.0)]
    run = forks.run(*SFT, setting / "sft.yaml", *options, ranks=2, before=before)
    assert run.status == [2, 2], run.stderr
    assert "the checkpoint of step-000002 was not written: " in run.stderr
    assert "the disk is broken" in run.stderr
    assert "There is no older one" in run.stderr
    assert "Traceback" not in run.stderr
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert saved(run_dir) == []
