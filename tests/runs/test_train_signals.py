"""Real runs stopped by a signal or a time limit, and resumed to equal an uninterrupted run; two runs in one run_dir."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import orjson
import pytest
import torch
from forks import Forks, Run
from resume_runs import (
    MADE_UP,
    SFT,
    STEPS,
    TRAIN,
    assert_like_whole,
    assert_refused,
    read_steps,
    wait_for,
    wait_for_line,
)
from rl_runs import weights, write_config

from megatron_rl.lab.run import read_metrics
from megatron_rl.stop import STATUS

# ---- signals and time ------------------------------------------------------------------------------------------


def stop(forks: Forks, run: Run, run_dir: Path, after: int, number: signal.Signals) -> Run:
    """Sends the signal to all ranks once `after` lines are written."""
    deadline = time.monotonic() + 60
    file = run_dir / "metrics.jsonl"
    while not file.exists() or len(read_metrics(file)) < after:
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for pid in run.pids:
        os.kill(pid, number)
    return forks.wait(run)


@pytest.mark.parametrize(("number", "seed"), [("SIGTERM", 0), ("SIGINT", 1), ("SIGUSR1", 2)])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_equals_the_whole_run(
    forks: Forks, setting: Path, tmp_path: Path, number: str, seed: int
) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    after = random.Random(seed).randrange(1, STEPS - 1)
    stopped = stop(forks, forks.start(*arguments), run_dir, after, signal.Signals[number])
    assert stopped.status == [STATUS], stopped.stderr
    assert f"{number}: stopped after step" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    step = len(read_metrics(run_dir / "metrics.jsonl"))
    assert after <= step < STEPS
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert forks.run(*arguments, "--resume").status == [0]
    assert_like_whole(setting, run_dir)


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments, ranks=2)
    wait_for_line(forks, run, run_dir)
    os.kill(run.pids[1], signal.SIGTERM)
    forks.wait(run)
    assert run.status == [STATUS, STATUS], run.stderr
    step = len(read_metrics(run_dir / "metrics.jsonl"))
    assert f"SIGTERM: stopped after step {step} of 2000" in run.stderr
    assert (run_dir / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    more = forks.run(*arguments, f"steps={step + 1}", "--resume", ranks=2)
    assert more.status == [0, 0], more.stderr


def test_a_second_signal_ends_the_run_at_once(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments, before=[("patches:slow_steps", 60.0)])
    wait_for(forks, run, "slow step")  # the step takes a minute
    os.kill(run.pids[0], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGTERM)  # an echo of the first signal
    time.sleep(1.0)
    assert forks.poll(run), "an echo of the first signal ended the run"
    time.sleep(5.0)
    os.kill(run.pids[0], signal.SIGTERM)
    assert forks.wait(run, timeout=10).status == [-signal.SIGTERM]
    # The dead process no longer owns the directory, so the next start gets past that check.
    assert_refused(forks.run(*arguments, "--resume"), "no whole checkpoint")


def test_time_limits_save_checkpoints_and_stop_the_run(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """checkpoint.minutes and max_minutes are so short that they act after every step."""
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    run = forks.run(*arguments, "checkpoint.minutes=0.00001", "checkpoint.keep=9")
    assert run.status == [0]
    assert len(list((run_dir / "checkpoints").iterdir())) == STEPS
    shutil.rmtree(run_dir)

    for step in range(1, STEPS):
        run = forks.run(*arguments, "max_minutes=0.00001", *(["--resume"] if step > 1 else []))
        assert run.status == [STATUS], run.stderr
        assert f"max_minutes: stopped after step {step} of {STEPS}" in run.stderr
    assert forks.run(*arguments, "--resume").status == [0]
    assert_like_whole(setting, run_dir)


@pytest.fixture(scope="module")
def rl(forks: Forks, setting: Path) -> Path:
    """The configuration of an RL run on made-up answers; the uninterrupted run is `whole-rl` in the same folder."""
    lines = (orjson.dumps({"id": f"p{i}", "prompt": f"{i} {i % 4}", "answer": "7"}) for i in range(12))
    (setting / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = write_config(setting / "rl.yaml", setting / "model", setting / "unused", preset="grpo")
    text = config.read_text().replace("train: unused", f"train: {setting / 'prompts.jsonl'}, verifier: math")
    text = text.replace("{steps: 2, mini_batches: 4}", "{steps: 3, mini_batches: 2}")
    config.write_text(text.replace(f"replay_from: {setting / 'unused'}", "replay_from: null"))
    whole = forks.run(*TRAIN, config, f"run_dir={setting / 'whole-rl'}", before=MADE_UP)
    assert whole.status == [0], whole.stderr
    return config


@pytest.mark.distributed
def test_a_signal_during_a_rollout_loses_only_the_current_step(
    forks: Forks, setting: Path, rl: Path, tmp_path: Path
) -> None:
    """On one rank; and on two ranks, of which only the one that waits for the rollout gets the signal."""
    for ranks, layout in ((1, "parallel.tp=1"), (2, "parallel.tp=2")):
        run_dir = tmp_path / str(ranks)
        arguments = (*TRAIN, rl, f"run_dir={run_dir}", layout)
        run = forks.start(*arguments, ranks=ranks, before=[("patches:made_up_rollouts", 600.0)])
        wait_for(forks, run, "slow rollout")
        os.kill(run.pids[0], signal.SIGTERM)
        forks.wait(run)
        assert run.status == [STATUS] * ranks, run.stderr
        assert "SIGTERM: stopped after step 1 of 3" in run.stderr
        assert "Traceback" not in run.stderr
        assert read_steps(run_dir) == [1]
        more = forks.run(*arguments, "--resume", ranks=ranks, before=MADE_UP)
        assert more.status == [0] * ranks, more.stderr
        assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 1, 2, 2, 3, 3]
    expected, found = weights(setting / "whole-rl"), weights(tmp_path / "1")
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


# ---- two runs at once ------------------------------------------------------------------------------------------


def test_two_trainers_cannot_share_a_run_dir(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments)
    wait_for_line(forks, run, run_dir)
    for more in ([], ["--resume"]):
        second = forks.run(*arguments, *more)
        told = "not an empty directory" if not more else f"is in use by process {run.pids[0]} on "
        assert_refused(second, told)
    assert forks.poll(run), "the first went on"
    os.kill(run.pids[0], signal.SIGKILL)
    assert forks.wait(run).status == [-signal.SIGKILL]
    lines = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))

    shutil.rmtree(run_dir)
    both = [forks.start(*SFT, setting / "sft.yaml", f"run_dir={run_dir}") for _ in range(2)]
    statuses = [forks.wait(run).status[0] for run in both]
    assert sorted(statuses) == [0, 2]  # type: ignore[type-var]
    assert_refused(both[statuses.index(2)], "run_dir")
    assert_like_whole(setting, run_dir)
