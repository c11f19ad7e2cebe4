"""Steps that a resume makes again, and rounds of a step, among groups that are done and groups that are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.prompts import PromptCursor, PromptDataset
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.quota import Quota
from megatron_rl.rollout.flow import Flow
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.selection import after_taking

PROMPTS = 4
DATASET = PromptDataset([Prompt(str(n), str(n), (), "", "") for n in range(64)], lambda text: [int(text)])


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def of_version(number: int, version: int) -> Future[Group]:
    prompt = Prompt(str(number), "", (1,), "", "")
    group: Future[Group] = Future()
    group.set_result(Group(number, prompt, (Sample.start(prompt, 0).extend([2], [-1.0], version),)))
    return group


class Run:
    """One rank's quota and flow after `step` steps. Groups in `versions` are done, and have tokens of that version. A
    group that is started again is done too, with tokens of the version `step`."""

    def __init__(self, ledger: Path, step: int, versions: Mapping[int, int], *, lag: int, over_sampling: float = 2.0):
        self.progress = Progress(step, 20, PromptCursor(3))
        self.ledger = Ledger(ledger, group_size=1, temperature=1, vocab_size=9)
        self.started: list[int] = []
        self.restarted: list[int] = []
        self._versions = versions
        self.flow = Flow(DATASET, self._start, 0, 1)
        config = RolloutConfig(prompts_per_step=PROMPTS, lag=lag, over_sampling=over_sampling)
        assert dist.group.WORLD is not None
        self.waits: Callable[[], None] = lambda: pytest.fail("waits for groups that are never done")
        environment: Any = SimpleNamespace(restart=self._restart, wait_for_one=lambda *_: self.waits())
        trainer: Any = SimpleNamespace(
            place=SimpleNamespace(control=dist.group.WORLD, rank=0),
            journal=SimpleNamespace(phase=lambda _: contextlib.nullcontext()),
            run=SimpleNamespace(pending=ledger),
            writing=lambda *_: contextlib.nullcontext(),
            check_interrupted=lambda: None,
        )
        self.quota = Quota(config, trainer, environment, self.ledger, self.flow)

    def choose(self, count: int = PROMPTS, first: int = 0) -> list[int]:
        numbers = self.quota.choose(self.progress, count, first)
        self.flow.take(numbers)
        number, self.progress.taken = after_taking(self.flow.number(self.progress.cursor), self.progress.taken, numbers)
        self.progress.cursor = self.flow.cursor(number, 3)
        return numbers

    def _start(self, number: int, prompt: Prompt) -> Future[Group]:
        self.started.append(number)
        return of_version(number, self._versions[number]) if number in self._versions else Future()

    def _restart(self, number: int, prompt: Prompt) -> Future[Group]:
        self.restarted.append(number)
        return of_version(number, self.progress.step)


def test_a_step_that_is_made_again_takes_the_same_groups_and_refills(tmp_path: Path) -> None:
    """Its first round leaves four prompts of the next step in flight, and its refill is the one of them that is done
    first, without a wait for those before it."""
    killed = Run(tmp_path, 5, dict.fromkeys((0, 1, 2, 3, 7), 5), lag=1)
    chosen = [killed.choose(), killed.choose(1, first=PROMPTS)]
    assert chosen == [[0, 1, 2, 3], [7]]
    assert killed.started == list(range(9))

    resumed = Run(tmp_path, 5, dict.fromkeys(range(9), 5), lag=1)
    assert [resumed.choose(), resumed.choose(1, first=PROMPTS)] == chosen


def test_a_step_that_is_made_again_with_a_smaller_lag_takes_no_group_that_is_too_old(tmp_path: Path) -> None:
    """Groups that are too old are sampled again while the step waits for others."""
    versions = {0: 3, **dict.fromkeys(range(1, 8), 5)}
    killed = Run(tmp_path, 5, versions, lag=2)
    assert killed.choose() == [0, 1, 2, 3]
    resumed = Run(tmp_path, 5, versions, lag=1)
    resumed.choose()
    assert resumed.restarted == [0]


def test_a_step_that_is_made_again_with_a_smaller_lag_leaves_none_that_becomes_too_old(tmp_path: Path) -> None:
    """With lag 1 the next step may not train on version 4."""
    versions = {7: 4, **dict.fromkeys(range(7), 5)}
    Run(tmp_path, 5, {}, lag=2).ledger.write_choice(6, 0, [0, 1, 2, 3])
    assert Run(tmp_path, 5, versions, lag=2).choose() == [0, 1, 2, 3]
    assert Run(tmp_path, 5, versions, lag=1).choose() == [0, 1, 2, 7]


@pytest.mark.parametrize("wrong", [[0, 1, 2], [0, 1, 2, 99]], ids=["another size", "another number in flight"])
def test_a_run_that_has_chosen_otherwise_does_not_follow_later_choices(tmp_path: Path, wrong: list[int]) -> None:
    resumed = Run(tmp_path, 5, dict.fromkeys(range(16), 5), lag=1)
    resumed.ledger.write_choice(6, 0, wrong)
    resumed.ledger.write_choice(7, 0, [8, 9, 10, 11])
    assert resumed.choose() == [0, 1, 2, 3]
    resumed.progress.step = 6
    assert resumed.choose() == [4, 5, 6, 7]
