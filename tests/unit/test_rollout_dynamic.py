"""Dynamic sampling: which groups are kept, and how many prompts are requested."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.dynamic_sampling import DynamicSamplingConfig
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.rollout.dynamic import DynamicSamplingError, Search, Tally

SIZE = 4  # samples of a group


def group(index: int, *verdicts: tuple[float, bool]) -> Group:
    prompt = Prompt(f"p{index}", "", (3, 4), "", "")
    samples = (Sample.start(prompt, n) for n in range(len(verdicts)))
    judged = (dataclasses.replace(s, verdict=Verdict(*v)) for s, v in zip(samples, verdicts, strict=True))
    return Group(index, prompt, tuple(judged))


def run(search: Search, correct: list[int]) -> tuple[Search, list[int]]:
    """Runs a search over prompts with `correct` right answers each, repeated. Returns it and the prompts per round."""
    answers = itertools.cycle(correct)
    rounds = []
    while count := search.next_count():
        first = len(search.tallies)
        search = search.after([Tally(first + n, next(answers), SIZE) for n in range(count)])
        rounds.append(count)
    return search, rounds


def kept(search: Search) -> list[int]:
    """Returns the indexes of prompts whose groups are kept, in their new order."""
    groups = [group(tally.index) for tally in search.tallies]
    found = search.keep(groups)
    assert [g.index for g in found] == list(range(len(found)))
    return [int(g.prompt.id[1:]) for g in found]


# ---- one group ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "mixed"),
    [
        ([(1.0, True), (0.3, True)], False),  # both right, although the longer one is punished
        ([(-1.0, False), (-2.0, False)], False),
        ([(0.5, True), (0.5, False)], True),  # equal rewards, but one is right and one wrong
        ([(1.0, True), (-1.0, False)], True),
        ([(1.0, True)], False),
        ([(0.0, False)], False),
        ([], False),
    ],
)
def test_accuracy_and_not_reward_decides_if_a_group_is_mixed(verdicts: list[tuple[float, bool]], mixed: bool) -> None:
    assert Tally.of(group(0, *verdicts)).mixed is mixed


def test_a_group_without_verdicts_counts_as_neither_right_nor_wrong() -> None:
    search = Search(DynamicSamplingConfig(), 1).after([Tally(0, 0, 0), Tally(1, 0, SIZE), Tally(2, SIZE, SIZE)])
    figures = search.figures()
    assert (figures["all_correct"], figures["all_wrong"], figures["prompts"]) == (1, 1, 3)


# ---- the search --------------------------------------------------------------------------------------------------


def test_a_search_by_hand() -> None:
    """4 groups are wanted; each round requests 1.5 times the missing ones: 6 (2 mixed), 3 (1 mixed), 2 (2 mixed)."""
    config = DynamicSamplingConfig(oversample=1.5, max_refills=2)
    search, rounds = run(Search(config, wanted=4), [0, 1, 4, 4, 3, 0, 0, 4, 2, 2, 2])
    assert rounds == [6, 3, 2]
    assert kept(search) == [1, 4, 8, 9]
    assert search.figures() == {
        "prompts": 11,
        "kept": 4,
        "surplus": 1,
        "all_correct": 3,
        "all_wrong": 3,
        "refills": 2,
    }


@pytest.mark.parametrize(
    ("wanted", "oversample", "asked"),
    [(512, 1.5, 768), (10, 1.1, 11), (30, 1.1, 33), (7, 1.0, 7), (1, 1.01, 2), (3, 1.5, 5)],
)
def test_the_first_round_requests_the_oversampled_number_of_prompts(wanted: int, oversample: float, asked: int) -> None:
    assert Search(DynamicSamplingConfig(oversample=oversample), wanted).next_count() == asked


@given(
    wanted=st.integers(1, 12),
    oversample=st.floats(1, 4),
    max_refills=st.integers(0, 6),
    correct=st.lists(st.integers(0, SIZE), min_size=1, max_size=40),
)
def test_a_search_keeps_the_first_mixed_groups_or_raises_an_error(
    wanted: int, oversample: float, max_refills: int, correct: list[int]
) -> None:
    config = DynamicSamplingConfig(oversample=oversample, max_refills=max_refills)
    everything = list(itertools.islice(itertools.cycle(correct), 2000))
    mixed = [index for index, count in enumerate(everything) if 0 < count < SIZE]
    try:
        search, rounds = run(Search(config, wanted), correct)
    except DynamicSamplingError:
        # Even the smallest number of prompts over all rounds has too few mixed groups.
        assert len([index for index in mixed if index < wanted + max_refills]) < wanted
        return
    assert kept(search) == mixed[:wanted]
    assert rounds[0] == math.ceil(round(wanted * oversample, 6))
    assert len(rounds) <= 1 + max_refills
    figures = search.figures()
    assert figures["prompts"] == sum(rounds)
    assert figures["prompts"] == sum(figures[name] for name in ("kept", "surplus", "all_correct", "all_wrong"))
    assert (figures["kept"], figures["refills"]) == (wanted, len(rounds) - 1)


@given(st.lists(st.integers(0, SIZE), min_size=12, max_size=12), st.integers(1, 5), st.randoms())
def test_the_result_does_not_depend_on_how_leaders_share_prompts(correct: list[int], leaders: int, random) -> None:
    tallies = [Tally(index, count, SIZE) for index, count in enumerate(correct)]
    alone = Search(DynamicSamplingConfig(), wanted=3).after(tallies)
    shuffled = random.sample(tallies, len(tallies))
    shared = Search(DynamicSamplingConfig(), wanted=3).after(shuffled)
    assert shared == alone
    groups = [group(index) for index in range(12)]
    parts = [shared.keep(groups[leader::leaders]) for leader in range(leaders)]
    together = sorted((g.index, g.prompt.id) for part in parts for g in part)
    assert together == [(g.index, g.prompt.id) for g in alone.keep(groups)]


@pytest.mark.parametrize("indexes", [[0, 2], [0, 0], [1, 2]])
def test_a_lost_or_duplicate_group_is_an_error(indexes: list[int]) -> None:
    with pytest.raises(ValueError, match="a group was lost, judged twice or numbered wrongly"):
        Search(DynamicSamplingConfig(), 3).after([Tally(index, 1, SIZE) for index in indexes])


@pytest.mark.parametrize(
    ("correct", "tally", "hint"),
    [
        ([SIZE, SIZE, 0], "8 were answered all right and 4 all wrong", "harder prompts"),
        ([0], "0 were answered all right and 12 all wrong", "easier prompts"),
    ],
)
def test_a_search_without_mixed_groups_is_an_error(correct: list[int], tally: str, hint: str) -> None:
    search = Search(DynamicSamplingConfig(oversample=1.0, max_refills=2), wanted=4)
    with pytest.raises(DynamicSamplingError) as caught:
        run(search, correct)
    message = str(caught.value)
    assert message.startswith("rollout.dynamic_sampling: 0 of the 4 groups of a step have right and wrong answers")
    assert "after 2 refills (max_refills); of 12 prompts sampled" in message
    for part in (tally, f"{hint} or a larger rollout.group_size", "--resume goes on with more max_refills"):
        assert part in message
