"""The plan of a rollout batch: properties for every batch and every layout."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rl.data.schedule import Denominators, SampleSize, Schedule, ScheduleError, plan


def batch(lengths: list[list[tuple[int, int]]]) -> list[SampleSize]:
    """Makes the sizes of a batch; `lengths` has one list of (prompt, response) tokens per group."""
    pairs = [(group, p, r) for group, samples in enumerate(lengths) for p, r in samples]
    return [SampleSize(i, group, p + r, r) for i, (group, p, r) in enumerate(pairs)]


def members(schedule: Schedule) -> list[list[int]]:
    return [sorted(i for r in s.micro_batches for part in r for i in part) for s in schedule.steps]


sample = st.tuples(st.integers(1, 40), st.integers(0, 400))
groups = st.lists(st.lists(sample, min_size=4, max_size=9), min_size=4, max_size=4)
layouts = st.fixed_dictionaries(
    {
        "dp": st.integers(1, 3),
        "max_tokens": st.integers(200, 2000),
        "micro_batch_multiple": st.sampled_from([1, 2]),
        "align": st.sampled_from([1, 4, 8]),
    }
)


@given(groups, layouts, st.sampled_from([1, 2, 4]))
def test_each_sample_is_used_once_within_budget_and_in_lockstep(lengths, layout, mini_batches):
    sizes = batch(lengths)
    by_index = {size.index: size for size in sizes}
    schedule = plan(sizes, mini_batches=mini_batches, **layout)
    assert sorted(i for step in members(schedule) for i in step) == sorted(by_index)
    for step in schedule.steps:
        counts = {len(replica) for replica in step.micro_batches}
        assert len(step.micro_batches) == layout["dp"]
        assert len(counts) == 1
        assert counts.pop() % layout["micro_batch_multiple"] == 0
        for part in (part for replica in step.micro_batches for part in replica):
            padded = [-(-by_index[i].tokens // layout["align"]) * layout["align"] for i in part]
            assert len(part) == 1 or sum(padded) <= layout["max_tokens"]


@given(groups, layouts, layouts, st.sampled_from([1, 2, 4]))
def test_the_samples_of_a_step_do_not_depend_on_the_layout(lengths, one, other, mini_batches):
    sizes = batch(lengths)
    roomy = {"max_tokens": 10**6, "micro_batch_multiple": 1}
    first = plan(sizes, mini_batches=mini_batches, **{**one, **roomy})
    second = plan(list(reversed(sizes)), mini_batches=mini_batches, **{**other, **roomy})
    assert members(first) == members(second)
    assert [s.denominators for s in first.steps] == [s.denominators for s in second.steps]
    assert [s.mini_batch for s in first.steps] == list(range(mini_batches))


@given(groups, layouts, st.randoms(use_true_random=False))
def test_a_plan_does_not_depend_on_the_order_of_the_sizes(lengths, layout, shuffler):
    """Every rank makes its own, and they must be the same."""
    sizes = batch([[(p, r // 100) for p, r in samples] for samples in lengths])  # many of one length
    shuffled = list(sizes)
    shuffler.shuffle(shuffled)
    assert plan(shuffled, mini_batches=2, **layout) == plan(sizes, mini_batches=2, **layout)


@given(groups)
def test_mini_batches_are_consecutive_blocks_of_whole_groups(lengths):
    sizes = batch(lengths)
    schedule = plan(sizes, mini_batches=2, dp=1, max_tokens=10**6)
    assert members(schedule) == [[s.index for s in sizes if s.group // 2 == half] for half in (0, 1)]


def test_group_numbers_may_have_gaps():
    sizes = [SampleSize(g * 8 + i, g, 10, 5) for g in (3, 5, 11, 40) for i in range(2)]
    schedule = plan(sizes, mini_batches=2, dp=1, max_tokens=100)
    assert members(schedule) == [[24, 25, 40, 41], [88, 89, 320, 321]]


@given(groups)
def test_denominators_count_masked_in_tokens_and_their_sequences(lengths):
    step = plan(batch(lengths), mini_batches=1, dp=2, max_tokens=10**6).steps[0]
    responses = [r for group in lengths for _, r in group]
    by_prompt = {number: sum(r for _, r in group) for number, group in enumerate(lengths)}
    assert step.denominators == Denominators(sum(responses), sum(r > 0 for r in responses), by_prompt)
    assert step.denominators.prompts == sum(any(r for _, r in group) for group in lengths)


def test_denominators_refuse_prompts_that_do_not_have_all_tokens():
    with pytest.raises(ValueError, match="the prompts have 3 masked-in tokens, but the mini-batch has 4"):
        Denominators(tokens=4, sequences=2, prompt_tokens={0: 1, 1: 2})


def test_denominators_refuse_more_sequences_than_tokens():
    with pytest.raises(ValueError, match="3 sequences cannot share 2"):
        Denominators(tokens=2, sequences=3)


@given(groups, st.integers(1, 4), st.booleans())
@example([[(1, 400)] * 4, [(1, 1)] * 9, [(1, 1)] * 9, [(1, 1)] * 9], 4, True)
def test_replicas_are_balanced_to_within_one_sample(lengths, dp, at_home):
    """A replica exceeds its fair share by at most the cost of the longest sample, wherever samples were fetched."""
    sizes = batch(lengths)
    step = plan(sizes, mini_batches=1, dp=dp, max_tokens=10**6, home=[0] * len(sizes) if at_home else None).steps[0]
    cost = {size.index: size.cost for size in sizes}
    loads = [sum(cost[i] for part in replica for i in part) for replica in step.micro_batches]
    assert max(loads) <= sum(loads) / dp + max(cost.values()) + 1e-6


@pytest.mark.parametrize(("max_tokens", "bound"), [(20480, 0.01), (16384, 0.03)])
def test_most_samples_stay_on_the_replica_that_fetched_them(max_tokens, bound):
    """512 long-tailed responses on 8 replicas: without `home`, seven of eight samples would move.

    The smaller budget leaves only 6% of four micro-batches free.
    """
    rng = random.Random(0)
    lengths = [[(100, min(8192, int(rng.lognormvariate(6.5, 0.8)))) for _ in range(16)] for _ in range(32)]
    sizes = batch(lengths)
    home = [size.group % 8 for size in sizes]

    def moved_and_imbalance(home: list[int] | None) -> tuple[float, float]:
        replicas = plan(sizes, mini_batches=1, dp=8, max_tokens=max_tokens, home=home).steps[0].micro_batches
        where = {i: dp for dp, replica in enumerate(replicas) for part in replica for i in part}
        loads = [sum(sizes[i].cost for part in replica for i in part) for replica in replicas]
        moved = sum(where[size.index] != size.group % 8 for size in sizes) / len(sizes)
        return moved, max(loads) / (sum(loads) / 8) - 1

    moved, imbalance = moved_and_imbalance(home)
    elsewhere, _ = moved_and_imbalance(None)
    assert elsewhere > 0.8
    assert moved < 0.2
    assert imbalance < bound


def test_micro_batches_of_a_replica_are_even_and_the_fullest_come_first():
    rng = random.Random(1)
    sizes = batch([[(20, rng.randint(1, 200)) for _ in range(8)] for _ in range(8)])
    step = plan(sizes, mini_batches=1, dp=2, max_tokens=1500).steps[0]
    for replica in step.micro_batches:
        loads = [sum(sizes[i].tokens for i in part) for part in replica]
        assert loads == sorted(loads, reverse=True)
        assert min(loads) > 0.9 * max(loads)


def test_a_replica_with_one_long_sample_gets_short_ones_for_its_other_micro_batches():
    """Balancing by cost would give one replica only the long sample, and the other replica four micro-batches.

    Five micro-batches hold all samples, so three per replica suffice.
    """
    sizes = batch([[(1, 999)] + [(1, 99)] * 12])
    step = plan(sizes, mini_batches=1, dp=2, max_tokens=300).steps[0]
    assert [[len(part) for part in replica] for replica in step.micro_batches] == [[1, 2, 1], [3, 3, 3]]
    assert step.micro_batches[0][0] == (0,)


@pytest.mark.parametrize(
    ("tokens", "dp", "max_tokens", "count"),
    [
        ([200, 60, 60, 60], 2, 100, 2),
        ([30000, *[5000] * 7], 2, 8192, 4),
        ([9000, 20000, 4500, 4500, 4500, 4500], 2, 8192, 3),
    ],
)
def test_samples_that_fit_are_planned(tokens, dp, max_tokens, count):
    sizes = [SampleSize(i, i, n, n - 10) for i, n in enumerate(tokens)]
    step = plan(sizes, mini_batches=1, dp=dp, max_tokens=max_tokens).steps[0]
    assert [len(replica) for replica in step.micro_batches] == [count] * dp


@pytest.mark.parametrize(
    ("lengths", "options", "wanted"),
    [
        ([(1, 1)], {"dp": 3}, [[1], [0], [0]]),
        ([(1, 60)] * 5, {"dp": 2, "max_tokens": 100}, [[1, 1, 1], [1, 1, 0]]),
        ([(1, 60)] * 3, {"micro_batch_multiple": 4, "max_tokens": 100}, [[1, 1, 1, 0]]),
        ([(1, 1)] * 3, {"dp": 2, "micro_batch_multiple": 2}, [[1, 1], [1, 0]]),
    ],
)
def test_too_few_samples_leave_the_last_micro_batches_empty(lengths, options, wanted):
    step = plan(batch([lengths]), **{"mini_batches": 1, "dp": 1, "max_tokens": 1000, **options}).steps[0]
    assert [[len(part) for part in replica] for replica in step.micro_batches] == wanted


def test_best_fill_packs_better_than_first_fit_decreasing():
    """The best fill is 7 4 4 and 5 5 5. Longest first begins with 7 5 and leaves a 4 over."""
    sizes = [SampleSize(i, 0, n, 1) for i, n in enumerate([7, 5, 5, 5, 4, 4])]
    (replica,) = plan(sizes, mini_batches=1, dp=1, max_tokens=15).steps[0].micro_batches
    assert sorted(map(sorted, replica)) == [[0, 4, 5], [1, 2, 3]]


def test_the_token_budget_wins_over_even_micro_batches():
    """Eight micro-batches of 9 tokens hold all samples. Longest first into the emptiest of nine would need 10."""
    sizes = [SampleSize(i, 0, n, 1) for i, n in enumerate([5] * 4 + [4] * 4 + [3] * 12)]
    (replica,) = plan(sizes, mini_batches=1, dp=1, max_tokens=9, micro_batch_multiple=3).steps[0].micro_batches
    assert len(replica) == 9
    assert max(sum(sizes[i].tokens for i in part) for part in replica) == 9


def test_a_sample_uses_its_aligned_length_of_the_budget():
    sizes = [SampleSize(i, 0, 5, 1) for i in range(3)]
    for align, count in ((1, 1), (8, 2)):
        (replica,) = plan(sizes, mini_batches=1, dp=1, max_tokens=16, align=align).steps[0].micro_batches
        assert len(replica) == count


def test_a_sample_without_response_tokens_is_planned_and_counts_in_no_denominator():
    step = plan([SampleSize(0, 0, 9, 0), SampleSize(1, 0, 9, 3)], mini_batches=1, dp=1, max_tokens=100).steps[0]
    assert step.micro_batches == (((0, 1),),)
    assert step.denominators == Denominators(tokens=3, sequences=1, prompt_tokens={0: 3})


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([[(1, 1)] * 2] * 3, {"mini_batches": 2}, "3 groups do not divide into train.mini_batches = 2"),
        ([], {}, "0 groups"),
    ],
)
def test_the_error_for_an_impossible_plan_gives_the_reason(sizes, options, message):
    options = {"mini_batches": 1, "dp": 1, "max_tokens": 1000, **options}
    with pytest.raises(ScheduleError, match=message):
        plan(batch(sizes), **options)


def test_an_index_given_twice_is_an_error():
    with pytest.raises(ValueError, match="same index"):
        plan([SampleSize(7, 0, 9, 3)] * 2, mini_batches=1, dp=1, max_tokens=100)


def test_a_large_batch_is_planned_quickly():
    rng = random.Random(2)
    sizes = batch([[(100, int(rng.lognormvariate(7, 1))) for _ in range(16)] for _ in range(512)])
    start = time.perf_counter()
    plan(sizes, mini_batches=1, dp=8, max_tokens=16384, home=[s.group % 8 for s in sizes])
    assert time.perf_counter() - start < 8
