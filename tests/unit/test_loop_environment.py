"""What the environment asks the servers for, and how it judges what they answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.data.versions import Versions
from megatron_rl.loop.environment import Environment
from megatron_rl.ranks.activity import Activity
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.sampler import Sampling

PROMPT = Prompt("", "", (1,), "1", "arithmetic")


class Leader:
    """A stand-in that answers with one token."""

    def __init__(self) -> None:
        self.loop = BackgroundLoop()
        self.asked: list[Sampling] = []

    async def group(self, number: int, prompt: Prompt, sampling: Sampling) -> Group:
        self.asked.append(sampling)
        await asyncio.sleep(0.01 * number)
        return Group(number, prompt, (Sample.start(prompt, 0).extend([2], [-1.0], sampling.versions.newest),))

    def sample(self, prompts: list[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
        return [self.loop.run(self.group(number, prompt, sampling)) for number, prompt in prompts]


def environment(leader: Leader, versions: Versions, root: Path) -> Environment:
    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(seed=5),
        policy=SimpleNamespace(arch=SimpleNamespace(vocab_size=20)),
        watch=SimpleNamespace(wait=contextlib.nullcontext),
        run=SimpleNamespace(pending=root),
        journal=SimpleNamespace(activity=Activity()),
    )
    servers: Any = SimpleNamespace(leader=leader)
    publisher: Any = SimpleNamespace(versions=versions)
    judges: Any = SimpleNamespace()
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "1")
    ledger = Ledger(root, group_size=1, temperature=0.7, vocab_size=20)
    config = RolloutConfig(prompts_per_step=1, max_response_tokens=7, group_size=3, temperature=0.7)
    return Environment(config, trainer, servers, publisher, tokenizer, judges, ledger=ledger, top_k=2)


def test_rollouts_and_evaluations_are_sampled_as_the_configuration_says(tmp_path: Path) -> None:
    leader, versions = Leader(), Versions(3, lag=2)
    made = environment(leader, versions, tmp_path)
    made.wait([made.start(0, PROMPT)])
    made.evaluate([(0, PROMPT)], samples=4, temperature=0.5)
    rollout, evaluation = leader.asked
    for sampling in (rollout, evaluation):
        assert (sampling.max_response_tokens, sampling.vocab_size, sampling.seed) == (7, 20, 5)
    assert (rollout.samples, rollout.temperature, rollout.top_k) == (3, 0.7, 2)
    assert (evaluation.samples, evaluation.temperature, evaluation.top_k) == (4, 0.5, 0)
    assert [version for version in range(6) if version in rollout.versions] == [1, 2, 3]
    assert [version for version in range(6) if version in evaluation.versions] == [3]
    versions.newest = 4
    assert [version for version in range(6) if version in rollout.versions] == [2, 3, 4]


def test_groups_are_judged_while_others_are_sampled_and_together_if_they_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leader = Leader()
    made = environment(leader, Versions(0), tmp_path)
    judged: list[list[int]] = []
    second_is_there = threading.Event()

    def judge(groups: list[Group]) -> list[Group]:
        judged.append([group.index for group in groups])
        second_is_there.wait(30)
        return groups

    monkeypatch.setattr(made, "judge", judge)
    started = [made.start(number, PROMPT) for number in (0, 1, 2)]
    while len(made._sampled) < 2:  # the first is being judged
        pass
    second_is_there.set()
    assert [group.index for group in made.wait(started)] == [0, 1, 2]
    assert judged == [[0], [1, 2]]


def test_an_error_of_a_verifier_is_that_of_its_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = environment(Leader(), Versions(0), tmp_path)

    def judge(groups: list[Group]) -> list[Group]:
        raise RuntimeError("no verdict")

    monkeypatch.setattr(made, "judge", judge)
    with pytest.raises(RuntimeError, match="no verdict"):
        made.wait([made.start(0, PROMPT)])


def test_a_group_that_an_earlier_start_judged_is_not_sampled_again(tmp_path: Path) -> None:
    first, second = Leader(), Leader()
    made = environment(first, Versions(3), tmp_path)
    (group,) = made.wait([made.start(7, PROMPT)])
    made = environment(second, Versions(3), tmp_path)
    (again,) = made.wait([made.start(7, PROMPT)])
    assert second.asked == []
    assert again.samples[0].verdict == group.samples[0].verdict is not None
    made.wait(
        [made.start(8, PROMPT), made.restart(7, PROMPT), made.start(7, Prompt("other", "", (1,), "1", "arithmetic"))]
    )
    assert len(second.asked) == 3
