"""Alarms in whole runs: one skips optimizer steps, one stops the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import Forks
from rl_runs import MINI_BATCHES, STEPS, save_rollouts, weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics
from megatron_rl.stop import STATUS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alarms")
    model = make_tiny_model(root / "model", num_layers=1)
    save_rollouts(model, root / "saved")
    return write_config(root / "config.yaml", model, root / "saved", preset="grpo")


def alarm(action: str, steps: int = 1) -> str:
    """Fires if a ratio is above 1: never in the first mini-batch of a step, always in the others."""
    return f'lab.alarms=[{{"metric": "ratio/max", "above": 1.0, "steps": {steps}, "action": "{action}"}}]'


@pytest.mark.distributed
def test_an_alarm_skips_optimizer_steps_on_all_ranks(forks: Forks, config: Path) -> None:
    run_dir = config.parent / "skips"
    done = forks.run("-m", "megatron_rl", "train", config, f"run_dir={run_dir}", alarm("skip"), ranks=2)
    assert done.status == [0, 0], done.stderr
    lines = read_metrics(run_dir / "metrics.jsonl")
    fires = [float(mini_batch > 0) for _ in range(STEPS) for mini_batch in range(MINI_BATCHES)]
    assert [line["alarm/ratio/max/skip"] for line in lines] == [line["skipped"] for line in lines] == fires
    assert done.stderr.count("alarm: ratio/max is ") == STEPS  # once per row of steps, and only on rank 0
    assert "above 1 (this optimizer step is skipped)" in done.stderr
    # The skipped steps changed nothing: each step's mini-batches after the second have the ratios of the second.
    ratios = [line["ratio/mean"] for line in lines if line["step"] == 1]
    assert ratios[0] == 1.0
    assert all(ratio != 1.0 for ratio in ratios[1:])


@pytest.mark.distributed
def test_an_alarm_that_warns_changes_no_weight(forks: Forks, config: Path) -> None:
    for name, more in (("plain", ()), ("warned", (alarm("warn"),))):
        done = forks.run("-m", "megatron_rl", "train", config, f"run_dir={config.parent / name}", *more)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("alarm: ") == (STEPS if more else 0)
    plain, warned = (weights(config.parent / name) for name in ("plain", "warned"))
    assert all(torch.equal(plain[key], warned[key]) for key in plain)


@pytest.mark.distributed
def test_an_alarm_stops_the_run_after_a_checkpoint(forks: Forks, config: Path) -> None:
    command = ("-m", "megatron_rl", "train", config, f"run_dir={config.parent / 'stops'}")
    done = forks.run(*command, alarm("stop", steps=MINI_BATCHES - 1), ranks=2)
    assert done.status == [STATUS, STATUS], done.stderr
    lines = read_metrics(config.parent / "stops" / "metrics.jsonl")
    assert [line["alarm/ratio/max/stop"] for line in lines] == [0.0] * (MINI_BATCHES - 1) + [1.0]
    assert f"above 1 in {MINI_BATCHES - 1} optimizer steps in a row: stopped after step 1 of {STEPS}" in done.stderr
    resumed = forks.run(*command, "lab.alarms=[]", "--resume", ranks=2)
    assert resumed.status == [0, 0], resumed.stderr
    assert len(read_metrics(config.parent / "stops" / "metrics.jsonl")) == STEPS * MINI_BATCHES
