"""Which prompts a leader starts, when, and which a step takes."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.prompts import PromptCursor, PromptDataset
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.quota import prompts_ahead
from megatron_rl.loop.rollouts import LiveGroups
from megatron_rl.rollout.flow import Flow
from megatron_rl.rollout.ledger import Ledger

DATASET = PromptDataset([Prompt(str(n), str(n), (), "", "") for n in range(10)], lambda text: [int(text)])


def started(share: int, of: int) -> tuple[Flow, list[int]]:
    numbers: list[int] = []

    def start(number: int, prompt: Prompt) -> Future[Group]:
        numbers.append(number)
        group: Future[Group] = Future()
        group.set_result(Group(number, prompt))
        return group

    return Flow(DATASET, start, share, of), numbers


def numbers_of(groups: list[Future[Group]]) -> list[int]:
    return [group.result().index for group in groups]


def test_prompts_are_started_once_and_in_their_order() -> None:
    flow, numbers = started(0, 1)
    cursor = PromptCursor(seed=3)
    flow.admit(cursor, (), 6, version=0)
    assert numbers == [0, 1, 2, 3, 4, 5]
    expected = [prompt.id for prompt in DATASET.take(cursor, 4)[0]]
    groups = flow.take([0, 1, 2, 3])
    assert [group.result().prompt.id for group in groups] == expected
    cursor = flow.cursor(4, 3)
    assert cursor == PromptCursor(3, epoch=0, position=4)
    flow.admit(cursor, (), 8, version=1)  # into the next epoch
    assert numbers == list(range(12))
    assert {number: begun.version for number, begun in flow.open.items()} == {
        4: 0,
        5: 0,
        **dict.fromkeys(range(6, 12), 1),
    }
    assert numbers_of(flow.take(range(4, 12))) == list(range(4, 12))
    cursor = flow.cursor(12, 3)
    assert (cursor.epoch, cursor.position) == (1, 2)
    assert flow.number(cursor) == 12


def test_leaders_share_the_prompts_whatever_the_cursor_of_a_resume() -> None:
    cursor = PromptCursor(3, epoch=1, position=1)
    shares = []
    for share in range(3):
        flow, numbers = started(share, 3)
        flow.admit(cursor, (), 7, version=0)
        assert numbers_of(flow.take(range(11, 18))) == numbers
        shares.append(numbers)
    assert shares == [[12, 15], [13, 16], [11, 14, 17]]


def test_prompts_that_steps_have_taken_are_not_started_again() -> None:
    flow, numbers = started(0, 1)
    flow.admit(PromptCursor(3, position=2), (3, 4, 6), 4, version=5)
    assert numbers == [2, 5, 7, 8]


@pytest.mark.parametrize(
    ("step", "over_sampling", "ahead"),
    [(0, None, 8), (6, None, 8), (7, None, 8), (8, None, 4), (9, None, 0), (0, 1.1, 1), (0, 1.75, 3), (9, 1.75, 0)],
)
def test_rollouts_begin_at_most_the_lag_ahead_and_none_for_steps_that_are_not_made(
    step: int, over_sampling: float | None, ahead: int
) -> None:
    config = RolloutConfig(prompts_per_step=4, lag=2, over_sampling=over_sampling)
    assert prompts_ahead(config, Progress(step, 10, PromptCursor(0))) == ahead


@pytest.mark.parametrize(
    ("versions", "kept"), [((3, 5), True), ((2, 5), False), ((5, 6), False), ((5,), True), ((3, 3), True)]
)
def test_a_group_that_is_too_old_or_too_new_is_sampled_again(versions: tuple[int, ...], kept: bool) -> None:
    """Its tokens are of versions from pi_old's, 5, to the lag of 2 before it."""
    prompt = Prompt("", "", (1,), "", "")
    sample = Sample.start(prompt, 0)
    for version in versions:
        sample = sample.extend([2], [-1.0], version)
    config: Any = SimpleNamespace(rollout=RolloutConfig(prompts_per_step=4, lag=2))
    trainer: Any = SimpleNamespace(place=SimpleNamespace(dp=0), layout=SimpleNamespace(dp=1))
    again: Future[Group] = Future()
    environment: Any = SimpleNamespace(restart=lambda number, prompt: again)
    groups = LiveGroups(config, trainer, environment, None, Ledger(Path(), group_size=1, temperature=1, vocab_size=9))
    found = groups._of_age(Group(7, prompt, (sample,)), 5)
    assert (found is not again) == kept
