"""Checkpoints: a killed and resumed run ends with exactly the weights of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forks import Forks
from resume_runs import assert_exported, figures
from rl_runs import assert_same, environment, run_all, save_rollouts, torchrun, weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics
from megatron_rl.stop import STATUS

STEPS = 6


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration; its uninterrupted run is in `whole` in the same folder."""
    root = tmp_path_factory.mktemp("checkpoint")
    model = make_tiny_model(root / "model", num_layers=2)
    save_rollouts(model, root / "saved", steps=STEPS)
    config = write_config(root / "config.yaml", model, root / "saved", preset="grpo")
    with config.open("a") as file:
        file.write("checkpoint: {every: 1, keep: 2}\n")
    run_all(forks, config, 2, [f"run_dir={root / 'whole'} train.steps={STEPS} optim.warmup_steps=5"])
    return config


def start(config: Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts two ranks with a real launcher; their standard error goes to `said` in the configuration's folder."""
    command = torchrun(2, "-m", "megatron_rl", "train", str(config), *options)
    with config.with_name("said").open("wb") as said:
        return subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )


@pytest.mark.distributed
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(forks: Forks, setting: Path) -> None:
    run_dir = setting.parent / "killed"
    options = (f"run_dir={run_dir}", f"train.steps={STEPS}", "optim.warmup_steps=5")
    command = ("-m", "megatron_rl", "train", setting, *options)
    killed = forks.start(*command, ranks=2)
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline
        assert forks.poll(killed), killed.stderr
        time.sleep(0.02)
    time.sleep(random.Random(0).uniform(0.0, 1.0))
    forks.kill(killed)
    forks.wait(killed)
    done = len(read_metrics(run_dir / "metrics.jsonl"))

    resumed = forks.run(*command, "--resume", ranks=2)
    assert resumed.status == [0, 0], resumed.stderr
    assert done < STEPS * 4, "the run was over before it was killed; the test shows nothing"
    for name, weight in weights(setting.parent / "whole").items():
        assert torch.equal(weight, weights(run_dir)[name]), name
    whole, again = (read_metrics(d / "metrics.jsonl") for d in (setting.parent / "whole", run_dir))
    assert [(m["step"], m["mini_batch"], m["loss"], m["lr"]) for m in again] == [
        (m["step"], m["mini_batch"], m["loss"], m["lr"]) for m in whole
    ]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    saved = read_metrics(setting.parent / "whole" / "checkpoints.jsonl")
    assert [line["step"] for line in saved] == list(range(1, STEPS + 1))
    assert all(line["time/checkpoint"] > 0 for line in saved)
    assert not any("time/checkpoint" in line for line in whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_forwards_a_signal_and_no_step_is_lost(setting: Path) -> None:
    run_dir = setting.parent / "stopped"
    options = (f"run_dir={run_dir}", f"train.steps={STEPS}", "optim.warmup_steps=5", "checkpoint.every=0")
    process = start(setting, *options)
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == STATUS
    step = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert step < STEPS, "the run was over before it was stopped; the test shows nothing"
    assert f"SIGTERM: stopped after step {step} of {STEPS}" in setting.with_name("said").read_text()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{step:06d}"]

    resumed = start(setting, *options, "--resume")
    assert resumed.wait(timeout=240) == 0
    for name, weight in weights(setting.parent / "whole").items():
        assert torch.equal(weight, weights(run_dir)[name]), name


@pytest.fixture(scope="module")
def begun(forks: Forks, setting: Path) -> Path:
    """A run of two steps on four ranks."""
    run_dir = setting.parent / "begun"
    degrees = "parallel.tp=2 parallel.pp=2 parallel.ep=2"
    run_all(forks, setting, 4, [f"run_dir={run_dir} train.steps=2 optim.warmup_steps=5 {degrees}"])
    return run_dir


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["dp", "parallel.tp=2", pytest.param("parallel.ep=2", marks=pytest.mark.slow)])
def test_a_run_goes_on_under_another_layout(
    forks: Forks, setting: Path, begun: Path, tmp_path: Path, layout: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(begun, run_dir)
    degrees = [] if layout == "dp" else [layout]
    options = (f"run_dir={run_dir}", f"train.steps={STEPS}", "optim.warmup_steps=5", *degrees, "--resume")
    answer = forks.run("-m", "megatron_rl", "train", setting, *options, ranks=2)
    assert answer.status == [0, 0], answer.stderr
    assert_same(run_dir, setting.parent / "whole", steps=STEPS)


@pytest.mark.distributed
def test_a_checkpoint_of_four_ranks_is_exported_by_one_process(forks: Forks, begun: Path, tmp_path: Path) -> None:
    assert_exported(forks, begun, tmp_path / "out")


@pytest.mark.distributed
def test_a_fork_takes_the_rollouts_of_the_steps_to_come(forks: Forks, setting: Path, tmp_path: Path) -> None:
    whole, run_dir = setting.parent / "whole", tmp_path / "run"
    options = (f"run_dir={run_dir}", f"train.steps={STEPS}", "optim.warmup_steps=5")
    answer = forks.run("-m", "megatron_rl", "train", setting, *options, "--fork", f"{whole}@{STEPS - 1}", ranks=2)
    assert answer.status == [0, 0], answer.stderr
    assert figures(run_dir) == figures(whole)[4 * (STEPS - 1) :]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name
