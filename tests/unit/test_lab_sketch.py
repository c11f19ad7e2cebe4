"""The mergeable accumulator: quantiles against NumPy, and merging. On ranks: ranks/test_lab_sketch_ranks.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.lab.sketch import GROWTH, QUANTILES, SMALLEST, Kind, MetricAccumulator

KINDS = {"total": Kind.SUM, "fraction": Kind.MEAN, "value": Kind.TAIL, "weight": Kind.RATIO}

DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "near one": lambda rng, n: 1 + 1e-3 * rng.normal(size=n),
    "tiny": lambda rng, n: 1e-5 * rng.normal(size=n),
    "below the grid": lambda rng, n: 1e-9 * rng.normal(size=n),
    "heavy tail": lambda rng, n: rng.standard_cauchy(n),
    "lengths": lambda rng, n: rng.integers(1, 20_000, n).astype(float),
    "two values": lambda rng, n: rng.integers(0, 2, n).astype(float),
}


def accumulate(values, kinds=KINDS):
    metrics = MetricAccumulator(kinds)
    for name in kinds:
        metrics.add(name, torch.as_tensor(values))
    return metrics


@pytest.mark.parametrize("count", [1, 2, 7, 100, 20_000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_statistics_of_a_tail_equal_numpy(name, count):
    values = DISTRIBUTIONS[name](np.random.default_rng(count), count)
    report = accumulate(values, {"x": Kind.TAIL}).finalize()
    assert report["x/min"] == values.min()
    assert report["x/max"] == values.max()
    assert report["x/mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
    assert report["x/std"] == pytest.approx(values.std(), rel=1e-6, abs=1e-8)
    for short, fraction in QUANTILES.items():
        exact = np.quantile(values, fraction, method="inverted_cdf")
        assert report[f"x/{short}"] == pytest.approx(exact, rel=GROWTH - 1, abs=2 * SMALLEST)


def test_few_values_have_exact_quantiles():
    values = torch.tensor([-3.0, 0.0, 0.1, 2.0, 700.0], dtype=torch.float64)
    report = accumulate(values, {"x": Kind.TAIL}).finalize()
    assert (report["x/p1"], report["x/p50"], report["x/p99"]) == (-3.0, 0.1, 700.0)


def test_quantiles_stay_within_the_extremes():
    report = accumulate(np.full(3, 0.1), {"x": Kind.TAIL}).finalize()  # 0.1 + 0.1 + 0.1 is not 0.3
    assert report["x/min"] == report["x/p50"] == report["x/p99"] == report["x/max"]


def test_ratio_quantiles_are_precise_near_one():
    log_weights = 2e-5 * np.random.default_rng(0).normal(size=50_000)
    weights = np.exp(log_weights)
    report = accumulate(log_weights, {"w": Kind.RATIO}).finalize()
    for short, fraction in QUANTILES.items():
        assert report[f"w/{short}"] == pytest.approx(
            np.quantile(weights, fraction, method="inverted_cdf"), rel=0, abs=1e-6
        )
    assert report["w/max"] == pytest.approx(weights.max(), abs=1e-15)
    assert report["w/mean"] == pytest.approx(weights.mean(), abs=1e-12)


def test_chi2_and_effective_sample_size_of_weights():
    weights = np.array([0.5, 1.0, 1.0, 4.0])
    report = accumulate(np.log(weights), {"w": Kind.RATIO}).finalize()
    assert report["w/chi2"] == pytest.approx(np.mean(weights**2) - 1)
    assert report["w/ess"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 4)


def test_weights_of_one_are_exact():
    report = accumulate(torch.zeros(999), {"w": Kind.RATIO}).finalize()
    assert {name: value for name, value in report.items() if value != 1} == {"w/std": 0, "w/chi2": 0}


def test_sums_and_fractions_by_hand():
    report = accumulate(torch.tensor([True, False, False, True, True])).finalize()
    assert report["total"] == 3
    assert report["fraction"] == 0.6


def test_metrics_added_at_once_are_those_added_one_by_one():
    rng = np.random.default_rng(0)
    counts = {"a": 9, "b": 9, "c": 4, "d": 0}
    kinds = {f"{kind.name}/{name}": kind for kind in KINDS.values() for name in counts}
    given = {name: torch.from_numpy(rng.normal(size=counts[name[-1]])) for name in kinds}
    given["TAIL/a"][3] = math.nan
    at_once, one_by_one = MetricAccumulator(kinds), MetricAccumulator(kinds)
    for _ in range(2):
        at_once.add_all(given)
        for name, values in given.items():
            one_by_one.add(name, values)
    assert at_once.finalize() == pytest.approx(one_by_one.finalize(), rel=1e-12)
    assert at_once.finalize()["TAIL/c/max"] == float(given["TAIL/c"].max())


def test_an_empty_metric_is_left_out_and_does_not_change_a_merge():
    empty = accumulate(torch.zeros(0))
    assert empty.finalize() == {"total": 0}
    full = accumulate(torch.tensor([1.0, 2.0]))
    before = full.finalize()
    full.merge(empty)
    assert full.finalize() == before


def test_non_finite_values_are_counted_and_left_out():
    values = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf])
    report = accumulate(values, {"x": Kind.TAIL}).finalize()
    assert report["x/not_finite"] == 3
    assert (report["x/min"], report["x/mean"], report["x/max"]) == (1.0, 2.0, 3.0)
    assert accumulate(torch.tensor([math.nan]), {"x": Kind.TAIL}).finalize() == {"x/not_finite": 1}
    assert "x/not_finite" not in accumulate(torch.ones(3), {"x": Kind.TAIL}).finalize()


def test_a_ratio_that_is_not_finite_does_not_count_as_1():
    values = torch.tensor([math.log(2), math.nan, math.inf], dtype=torch.float64)
    report = accumulate(values, {"w": Kind.RATIO}).finalize()
    assert report["w/not_finite"] == 2
    assert report["w/mean"] == pytest.approx(2)
    assert report["w/chi2"] == pytest.approx(3)


def test_an_overflowing_ratio_is_reported_as_infinite():
    report = accumulate(torch.tensor([0.0, 800.0], dtype=torch.float64), {"w": Kind.RATIO}).finalize()
    assert report["w/max"] == report["w/mean"] == math.inf


def test_an_undeclared_metric_is_an_error():
    with pytest.raises(KeyError):
        accumulate(torch.ones(1)).add("vlaue", torch.ones(1))


def test_accumulators_of_different_metrics_do_not_merge():
    with pytest.raises(ValueError, match="different metrics"):
        accumulate(torch.ones(1)).merge(MetricAccumulator({"total": Kind.SUM}))


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_results_do_not_depend_on_order_or_partition(values, parts, random):
    kinds = {"total": Kind.SUM, "fraction": Kind.MEAN, "value": Kind.TAIL}
    whole = accumulate(np.array(values), kinds).finalize()
    random.shuffle(values)
    merged = MetricAccumulator(kinds)
    for part in range(parts):
        merged.merge(accumulate(np.array(values[part::parts]), kinds))
    report = merged.finalize()
    assert report.keys() == whole.keys()
    for name, value in whole.items():
        scale = 1e-3 if name == "value/std" else 1e-6  # the std of equal numbers near 1e6 is only rounding
        assert report[name] == pytest.approx(value, rel=1e-9, abs=scale)
