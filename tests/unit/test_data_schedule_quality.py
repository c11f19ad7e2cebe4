"""Plans of lognormal lengths need hardly more micro-batches than possible, and are balanced where lengths allow it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rl.data.bin_packing import best_fill, best_fit, fewest_bins, fullest_subset
from megatron_rl.data.replica_balance import Division, exchange, least_fullest
from megatron_rl.data.schedule import SampleSize, StepPlan, plan

SIGMAS = (0.5, 1.0, 1.5)
ROOMY = 10**9


def lognormal(samples: int, sigma: float, seed: int) -> list[SampleSize]:
    rng = random.Random(seed)
    lengths = [max(2, round(1000 * rng.lognormvariate(0, sigma))) for _ in range(samples)]
    return [SampleSize(i, i // 4, n, n - 1) for i, n in enumerate(lengths)]


def budgets(sizes: Sequence[SampleSize]) -> list[int]:
    lengths = [s.tokens for s in sizes]
    return [times * unit for unit in (max(lengths), -(-sum(lengths) // len(lengths))) for times in (1, 2, 8, 32)]


def planned(sizes: Sequence[SampleSize], dp: int, max_tokens: int = ROOMY) -> StepPlan:
    return plan(sizes, mini_batches=1, dp=dp, max_tokens=max_tokens).steps[0]


def excess(sizes: Sequence[SampleSize], step: StepPlan) -> list[float]:
    """Returns tokens and cost of the fullest replica over the mean, minus 1."""
    here = [[sizes[i] for part in replica for i in part] for replica in step.micro_batches]
    tokens = [sum(s.tokens for s in replica) for replica in here]
    costs = [sum(s.cost for s in replica) for replica in here]
    return [max(each) * len(each) / sum(each) - 1 for each in (tokens, costs)]


def exact_bins(sizes: Sequence[int], capacity: int) -> int:
    """Returns the fewest bins by trying all orders: of each set, the fewest bins and the least in the last of them."""
    best: list[tuple[int, int]] = [(1, 0)] + [(len(sizes) + 1, 0)] * ((1 << len(sizes)) - 1)
    for chosen, (bins, used) in enumerate(best):
        bins, used = best[chosen]
        for number, size in enumerate(sizes):
            if not chosen >> number & 1:
                after = (bins, used + size) if used + size <= capacity else (bins + 1, size)
                best[chosen | 1 << number] = min(best[chosen | 1 << number], after)
    return best[-1][0]


def least_possible(sizes: Sequence[SampleSize]) -> float:
    """Returns the least maximum of tokens and cost over their means, minus 1, of all divisions among two replicas."""
    loads = np.array([[s.tokens, s.cost] for s in sizes])
    half = np.array(list(itertools.product((0, 1), repeat=len(sizes)))) @ loads
    share = loads.sum(axis=0) / 2
    return float((np.maximum(half, loads.sum(axis=0) - half) / share).max(axis=1).min() - 1)


def least_of_both(sizes: Sequence[SampleSize], dp: int) -> float:
    """Returns a lower bound of the larger excess, of tokens or cost, over the least that the fullest replica can have.

    If no other replica has too many tokens, the longest sample's has the rest, and these add cost: at least as much as
    those of the shortest samples.
    """
    tokens = sorted(s.tokens for s in sizes)
    longest, total = sizes[int(np.argmax([s.tokens for s in sizes]))], sum(tokens)
    tokens_least, cost_least = (least_fullest(np.array(each), dp) for each in (tokens, [s.cost for s in sizes]))
    reached = np.cumsum([0, *tokens[:-1]])
    added = np.cumsum([0, *(SampleSize(0, 0, n, 0).cost for n in tokens[:-1])])
    for excess in np.arange(0, 1, 0.001):
        rest = total - (dp - 1) * (1 + excess) * tokens_least - longest.tokens
        if longest.cost + np.interp(max(rest, 0), reached, added) <= (1 + excess) * cost_least:
            return float(excess)
    return 1.0


KNOWN = {(16, 8, 0.5, 0), (16, 8, 0.5, 1), (8, 2, 0.5, 0), (8, 8, 0.5, 0)}
"""Settings (samples, dp, sigma, seed) with one budget of which the plan has a bin more than the bound."""


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("samples", "dp"), [(4, 2), (4, 8), (8, 2), (8, 8), (16, 2), (16, 8), (16, 64), (64, 8)])
def test_plans_have_at_most_a_tenth_more_micro_batches_than_the_bound(samples, dp, sigma):
    for seed in (0, 1):
        sizes = lognormal(samples * dp, sigma, seed)
        over = []
        for max_tokens in budgets(sizes):
            bound = -(-fewest_bins([min(s.tokens, max_tokens) for s in sizes], max_tokens) // dp)
            over.append(len(planned(sizes, dp, max_tokens).micro_batches[0]) / bound)
        assert sum(each > 1.1 for each in over) == ((samples, dp, sigma, seed) in KNOWN)
        assert max(over) <= 1.25


def test_where_the_bound_is_exceeded_the_plan_has_the_fewest_micro_batches_there_are():
    """Two to a micro-batch of the longest's length, and one is left over, though tokens would fit into eight."""
    sizes = lognormal(16, 0.5, 0)
    lengths = [s.tokens for s in sizes]
    assert fewest_bins(lengths, max(lengths)) == 8
    assert exact_bins(lengths, max(lengths)) == 9 == len(planned(sizes, 1, max(lengths)).micro_batches[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("samples", "dp", "sigma"), [(16, 2, 0.5), (16, 8, 0.5), (16, 64, 0.5), (64, 8, 0.5), (16, 2, 1), (32, 2, 1)]
)
def test_replicas_of_sixteen_samples_differ_by_at_most_3_percent_in_tokens_and_cost(samples, dp, sigma, seed):
    sizes = lognormal(samples * dp, sigma, seed)
    assert max(excess(sizes, planned(sizes, dp))) <= 0.03


def test_four_samples_a_replica_are_divided_about_as_well_as_possible():
    """Brute force shows that 3% is impossible for some; so does the longest sample, if it exceeds the mean replica."""
    found = []
    for sigma, seed in itertools.product(SIGMAS, range(8)):
        sizes = lognormal(8, sigma, seed)
        found.append((least_possible(sizes), max(excess(sizes, planned(sizes, 2)))))
    assert sum(least > 0.03 for least, _ in found) > 5
    assert all(mine <= max(least + 0.03, 0.03) for least, mine in found)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_the_bound_of_bins_is_at_most_the_fewest_and_packings_hold_each_size_once(sizes):
    assert fewest_bins(sizes, 12) <= exact_bins(sizes, 12)
    for pack in (best_fit, best_fill):
        bins = pack(sizes, 12)
        assert sorted(i for part in bins for i in part) == list(range(len(sizes)))
        assert max(sum(sizes[i] for i in part) for part in bins) <= 12


def test_the_bound_of_bins_counts_large_sizes_and_what_does_not_fit_beside_them():
    assert fewest_bins([7, 7, 7], 12) == 3
    assert fewest_bins([7, 7, 6, 6, 6], 12) == 4
    assert fewest_bins([12, 4, 4, 4, 1], 12) == 3


@given(st.lists(st.integers(1, 20), max_size=8), st.integers(0, 40))
def test_the_fullest_subset_is_the_fullest_of_all(sizes, room):
    sizes = sorted(sizes)
    sums = {sum(each) for k in range(len(sizes) + 1) for each in itertools.combinations(sizes, k)}
    assert sum(sizes[i] for i in fullest_subset(sizes, room)) == max(each for each in sums if each <= room)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_no_division_is_more_even_than_the_bound(loads, dp):
    divisions = itertools.product(range(dp), repeat=len(loads))
    fullest = min(max(np.bincount(each, loads, dp)) for each in divisions)
    assert least_fullest(np.array(loads), dp) <= fullest


def division(loads: Sequence[int], *, dp: int, count: int, capacity: int, power: int = 1) -> Division:
    sizes = np.array(loads)
    return Division(np.stack([sizes, sizes**power], axis=1), sizes, np.full(len(loads), -1), dp, count, capacity)


@given(st.lists(st.integers(1, 20), min_size=4, max_size=24), st.integers(2, 3), st.integers(1, 3))
@example([14, 9, 12, 20, 14], 2, 1)  # what evens the cubes would need more room
def test_an_exchange_keeps_micro_batches_within_the_capacity(loads, dp, count):
    start = np.arange(len(loads)) // 2 % (dp * count)
    capacity = int(np.bincount(start, loads).max())
    after = exchange(division(loads, dp=dp, count=count, capacity=capacity, power=3), start)
    assert np.bincount(after, loads).max() <= capacity


def test_pairs_are_exchanged_if_no_single_sample_helps():
    """The best exchange of single samples leaves one replica 7% above the mean of 72."""
    loads = [11, 35, 31, 15, 37, 15]
    after = exchange(division(loads, dp=2, count=1, capacity=1000), np.array([0, 0, 0, 1, 1, 1]))
    assert np.bincount(after, loads).tolist() == [72, 72]


def test_a_replica_that_fetched_all_samples_gives_most_away():
    sizes = lognormal(800, 1.0, 0)
    step = plan(sizes, mini_batches=1, dp=2, max_tokens=ROOMY, home=[0] * len(sizes)).steps[0]
    assert max(excess(sizes, step)) <= 0.03


@pytest.mark.parametrize(
    ("samples", "dp", "sigma", "seed", "bound"),
    [(8, 2, 1.5, 0, 0.059), (16, 8, 1.0, 0, 0.028), (16, 8, 1.5, 1, 0.021), (64, 8, 1.0, 1, 0.072)],
)
def test_if_a_long_sample_sets_tokens_against_cost_both_exceed_the_least_by_hardly_more_than_they_must(
    samples, dp, sigma, seed, bound
):
    sizes = lognormal(samples * dp, sigma, seed)
    loads = [np.array([s.tokens for s in sizes]), np.array([s.cost for s in sizes])]
    unavoidable = [least_fullest(each, dp) * dp / each.sum() for each in loads]
    mine = [(1 + each) / least - 1 for each, least in zip(excess(sizes, planned(sizes, dp)), unavoidable, strict=True)]
    assert least_of_both(sizes, dp) == pytest.approx(bound, abs=0.0015)
    assert max(mine) <= bound + 0.005
