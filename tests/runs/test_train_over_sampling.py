"""A run that takes the groups that are done first loses no prompt when it is stopped or killed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from forks import Forks
from resume_runs import TRAIN, read_rollouts, read_steps, wait_for
from rl_runs import weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.data.sample import Group
from megatron_rl.lab.run import read_metrics

STEPS, PROMPTS, RANKS = 4, 4, 2
NEVER = 1000.0
"""Seconds for which every third prompt is not answered."""


def contents(groups: list[Group]) -> list[tuple[str, list[list[int]]]]:
    return [(group.prompt.id, [sample.token_ids.tolist() for sample in group.samples]) for group in groups]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_prompt_is_trained_on_once_by_a_run_that_is_stopped_and_killed(forks: Forks, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_layers=1, hidden_size=32, num_experts=4, expert_hidden_size=16)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "unused")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{n} 2", "answer": "7"}}\n' for n in range(64)))
    run_dir = tmp_path / "run"
    sizes = (f"train.steps={STEPS}", f"rollout.prompts_per_step={PROMPTS}", "rollout.group_size=4")
    data = (f"data.train={prompts}", "data.verifier=arithmetic", "rollout.replay_from=null", "checkpoint.every=0")
    quota = ("rollout.lag=1", "rollout.over_sampling=1.5")
    command: tuple[Any, ...] = (*TRAIN, config, f"run_dir={run_dir}", *sizes, *data, *quota)

    # Prompts 0 to 5 are begun, and 1 and 4 are not done: the first step takes the others, the second waits for the two.
    stopped = forks.start(*command, ranks=RANKS, before=[("patches:chance_rollouts", 99, NEVER)])
    while len(list((run_dir / "rollouts").glob("step-000001-dp-*.jsonl"))) < RANKS:
        assert forks.poll(stopped), stopped.stderr
    os.kill(stopped.pids[0], signal.SIGTERM)
    forks.wait(stopped)
    assert read_steps(run_dir) == [1]
    (manifest,) = (run_dir / "checkpoints").glob("*/manifest.json")
    state = orjson.loads(manifest.read_bytes())["state"]
    assert (state["cursor"]["position"], state["taken"]) == (1, [2, 3, 5])

    # It is killed in the last step, when prompt 15 is not answered. Two steps have no checkpoint.
    killed = forks.start(*command, "--resume", ranks=RANKS, before=[("patches:chance_rollouts", 15, 0.1)])
    wait_for(forks, killed, "slow rollout")
    while len(read_metrics(run_dir / "metrics.jsonl")) < 3:
        assert forks.poll(killed), killed.stderr
    forks.kill(killed)
    forks.wait(killed)
    assert read_steps(run_dir) == [1]
    shutil.copytree(run_dir, tmp_path / "killed")

    done = forks.run(*command, "--resume", ranks=RANKS, before=[("patches:chance_rollouts", 99)])
    assert done.status == [0] * RANKS, done.stderr
    for step in (1, 2, 3):
        assert contents(read_rollouts(run_dir, step)) == contents(read_rollouts(tmp_path / "killed", step))
    trained = [group.prompt.id for step in range(1, STEPS + 1) for group in read_rollouts(run_dir, step)]
    assert len(trained) == len(set(trained)) == STEPS * PROMPTS
    assert not list((run_dir / "pending").iterdir())

    # A run that was never interrupted and samples the same has the same weights.
    whole = tmp_path / "whole"
    replay = (*TRAIN, config, f"run_dir={whole}", *sizes, *data[:2], "checkpoint.every=0")
    replayed = forks.run(*replay, f"rollout.replay_from={run_dir}", ranks=RANKS)
    assert replayed.status == [0] * RANKS, replayed.stderr
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name
