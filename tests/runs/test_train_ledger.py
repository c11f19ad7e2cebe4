"""A run that is killed and resumed trains on all that was sampled before, once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from resume_runs import TRAIN, read_rollouts, read_steps, wait_for
from rl_runs import weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.data.sample import Group
from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics

STEPS, PROMPTS = 4, 4


@pytest.fixture(scope="module")
def rl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose answers depend on chance."""
    root = tmp_path_factory.mktemp("ledger")
    model = make_tiny_model(root / "model", num_layers=1, hidden_size=32, num_experts=4, expert_hidden_size=16)
    config = write_config(root / "config.yaml", model, root / "unused")
    lines = "".join(f'{{"prompt": "{n} 2", "answer": "7"}}\n' for n in range(64))
    (root / "prompts.jsonl").write_text(lines)
    return config


def command(rl: Path, run_dir: Path, *options: str) -> tuple[Any, ...]:
    sizes = (f"train.steps={STEPS}", f"rollout.prompts_per_step={PROMPTS}", "rollout.group_size=4")
    data = (f"data.train={rl.with_name('prompts.jsonl')}", "data.verifier=arithmetic", "rollout.replay_from=null")
    return (*TRAIN, rl, f"run_dir={run_dir}", *sizes, *data, *options)


def kept(run_dir: Path) -> dict[int, bytes]:
    return {int(file.stem.split("-")[1]): file.read_bytes() for file in (run_dir / "pending").glob("group-*.jsonl")}


def groups_of(run_dir: Path) -> dict[int, Group]:
    """Returns the groups of all steps by the number of their prompt."""
    found: dict[int, Group] = {}
    for step in range(1, STEPS + 1):
        for group in read_rollouts(run_dir, step):
            number = (step - 1) * PROMPTS + group.index
            assert number not in found
            found[number] = group
    return found


def tokens(group: Group) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in group.samples]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "lag", "checkpoints"), [(1, 0, []), (2, 0, [1]), (1, 2, [1])])
def test_a_killed_run_goes_on_with_what_was_sampled(
    forks: Forks, rl: Path, tmp_path: Path, ranks: int, lag: int, checkpoints: list[int]
) -> None:
    """It is killed in the third step, when a group of that step is done; it has no checkpoint, or that of the first
    step."""
    run_dir = tmp_path / "run"
    if checkpoints:
        first_options = (f"rollout.lag={lag}", "checkpoint.every=1", "train.steps=1")
        first = forks.run(*command(rl, run_dir, *first_options), ranks=ranks, before=[("patches:chance_rollouts", 99)])
        assert first.status == [0] * ranks, first.stderr
    options = (f"rollout.lag={lag}", "checkpoint.every=0")
    goes_on = ["--resume"] * len(checkpoints)
    killed = forks.start(
        *command(rl, run_dir, *options, *goes_on), ranks=ranks, before=[("patches:chance_rollouts", 2 * PROMPTS + 1)]
    )
    wait_for(forks, killed, "slow rollout")
    deadline = time.monotonic() + 60
    wanted = range(PROMPTS * len(checkpoints), 2 * PROMPTS + 1)
    while sorted(kept(run_dir)) != [*wanted] or len(read_metrics(run_dir / "metrics.jsonl")) < 2:
        assert forks.poll(killed), killed.stderr
        assert time.monotonic() < deadline, f"kept: {sorted(kept(run_dir))}; expected: {[*wanted]}"
    forks.kill(killed)
    forks.wait(killed)
    assert read_steps(run_dir) == checkpoints
    before = kept(run_dir)
    shutil.copytree(run_dir, tmp_path / "killed")

    done = forks.run(*command(rl, run_dir, *options, "--resume"), ranks=ranks, before=[("patches:chance_rollouts", 99)])
    assert done.status == [0] * ranks, done.stderr
    groups = groups_of(run_dir)
    assert sorted(groups) == list(range(STEPS * PROMPTS))
    assert len({group.prompt.id for group in groups.values()}) == STEPS * PROMPTS
    for number in before:
        (group,) = read_groups(tmp_path / "killed" / "pending" / f"group-{number:09d}.jsonl")
        assert tokens(groups[number]) == tokens(group)
    assert kept(run_dir).keys() == set()

    # A run that was never interrupted and samples the same has the same weights.
    whole = tmp_path / "whole"
    replayed = forks.run(*command(rl, whole, "checkpoint.every=0", f"rollout.replay_from={run_dir}"), ranks=ranks)
    assert replayed.status == [0] * ranks, replayed.stderr
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name
