"""Which groups a step takes of more than it needs, while others are still sampled."""

from __future__ import annotations

import random

import hypothesis
import hypothesis.strategies as st
import pytest

from megatron_rl.rollout.selection import Fact, after_taking, choose, choose_again, untaken


def numbers(chosen: list[Fact] | None) -> list[int] | None:
    return None if chosen is None else [fact.number for fact in chosen]


def facts_of(step: int, **groups: tuple[int, ...]) -> list[Fact]:
    """Groups that are `done` or `open`, by number; those of `old_...` are a weight version older than `step`."""
    return [
        Fact(number, name.endswith("done"), step - name.startswith("old_"))
        for name, members in groups.items()
        for number in members
    ]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"done": (3, 0, 2), "open": (1,)}, [0, 2]),
        ({"done": (3,), "open": (0, 1, 2)}, None),
        ({"done": (6, 7), "old_open": (1, 2)}, None),
        ({"done": (6, 7), "old_open": (2,), "old_done": (1,)}, None),
        ({"done": (6, 7), "old_done": (1, 2)}, [1, 2]),
        ({"done": (6, 7), "old_done": (5,)}, [5, 6]),
    ],
    ids=["the first that are done", "too few", "two are due", "one is due", "due ones are done", "room for another"],
)
def test_a_step_takes_what_is_done_and_waits_for_what_is_due(
    groups: dict[str, tuple[int, ...]], expected: list[int] | None
) -> None:
    assert numbers(choose(facts_of(4, **groups), 2, step=4, lag=1, prompts=2)) == expected


def test_a_step_waits_for_groups_that_later_steps_have_no_room_for() -> None:
    """With lag 2, step 2 is the last one for groups of version 0, and has room for two."""
    old, new = [Fact(number, False, 0) for number in range(3)], [Fact(number, True, 1) for number in range(5, 9)]
    assert choose(old + new, 2, step=1, lag=2, prompts=2) is None
    assert numbers(choose([Fact(0, True, 0), *old[1:], *new], 2, step=1, lag=2, prompts=2)) == [0, 5]
    assert numbers(choose(old[:2] + new, 2, step=1, lag=2, prompts=2)) == [5, 6]


@hypothesis.given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.floats(0, 1),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@hypothesis.settings(deadline=None)
def test_no_group_is_taken_twice_or_too_old_and_none_is_lost(
    lag: int, prompts: int, more: int, share: float, refills: int, rng: random.Random
) -> None:
    """Groups end in any order; one in four is much slower than the others. Some steps take more groups than `prompts`,
    as dynamic sampling does."""
    ahead = max(1, round(share * lag * prompts))
    first = 0
    taken: tuple[int, ...] = ()
    open_groups: dict[int, Fact] = {}
    trained: list[int] = []
    for step in range(12):
        refilled = [rng.randint(1, prompts) for _ in range(rng.randint(0, refills))]
        for count in (prompts + more, *refilled):
            for number in untaken(first, taken, count + ahead):
                open_groups.setdefault(number, Fact(number, False, step))
            while True:
                facts = list(open_groups.values())
                chosen = choose(facts, count, step=step, lag=lag, prompts=prompts)
                rng.shuffle(facts)
                assert choose(facts, count, step=step, lag=lag, prompts=prompts) == chosen
                if chosen is not None:
                    break
                unfinished = [fact for fact in open_groups.values() if not fact.done]
                quick = [fact for fact in unfinished if fact.number % 4] or unfinished
                ended = rng.choice(quick)
                open_groups[ended.number] = Fact(ended.number, True, ended.oldest)
            assert len(chosen) == count
            assert all(fact.done and step - lag <= fact.oldest for fact in chosen)
            trained += [fact.number for fact in chosen]
            first, taken = after_taking(first, taken, numbers(chosen) or ())
            for fact in chosen:
                del open_groups[fact.number]
    assert len(trained) == len(set(trained))
    assert {*trained, *open_groups} == set(range(max(*trained, *open_groups, 0) + 1))


@hypothesis.given(st.lists(st.sets(st.integers(0, 5), min_size=1), max_size=8), st.integers(0, 9))
def test_the_cursor_and_what_is_taken_after_it_tell_all_that_is_taken(places: list[set[int]], start: int) -> None:
    first, everything = start, set(range(start))
    taken: tuple[int, ...] = ()
    for chosen_places in places:
        ahead = untaken(first, taken, 6)
        assert ahead == sorted(ahead)
        assert not everything & set(ahead)
        chosen = [ahead[place] for place in chosen_places]
        everything |= set(chosen)
        first, taken = after_taking(first, taken, chosen)
        assert set(range(first)) | set(taken) == everything
        assert first not in everything


def test_a_step_that_is_made_again_takes_the_same_groups() -> None:
    facts = facts_of(4, done=(0, 1, 5), open=(3,))
    assert numbers(choose_again(facts, [5, 1])) == [1, 5]
    assert choose_again(facts, [1, 3]) is None
