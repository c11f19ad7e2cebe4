"""Arithmetic behind the curves of a report, against references that are written here."""

from __future__ import annotations

import math
import statistics

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.report.curves import by_mini_batch, decimate, layer_map, seed_band, statistics_of, student_t95
from megatron_rl.report.loaded_runs import MetricColumns


def columns(*lines: dict[str, float | None]) -> MetricColumns:
    return MetricColumns("metrics.jsonl", [{"step": i // 2 + 1, "mini_batch": i % 2, **x} for i, x in enumerate(lines)])


@given(st.integers(0, 1000), st.integers(1, 400), st.integers(8, 60))
def test_a_decimated_curve_keeps_its_ends_and_its_extremes(seed: int, size: int, points: int) -> None:
    values = np.random.default_rng(seed).normal(size=size).tolist()
    x, y = decimate(np.arange(size), np.array(values), points)
    assert len(x) <= points
    assert [values[i] for i in x] == list(y)
    assert (x[0], x[-1]) == (0, len(values) - 1)
    assert (y.min(), y.max()) == (min(values), max(values))
    assert (np.diff(x) > 0).all()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 19, 30])
def test_the_t_quantile_encloses_95_percent(freedom: int) -> None:
    v = mpmath.mpf(freedom)
    scale = mpmath.gamma((v + 1) / 2) / (mpmath.sqrt(v * mpmath.pi) * mpmath.gamma(v / 2))
    inside = mpmath.quad(lambda t: scale * (1 + t * t / v) ** (-(v + 1) / 2), [0, 1, student_t95(freedom)])
    assert float(2 * inside) == pytest.approx(0.95, abs=2e-5)


def test_the_t_interval_never_narrows_below_its_last_entry() -> None:
    assert student_t95(31) == student_t95(10_000) == student_t95(30)


def test_a_band_is_the_t_interval_of_the_mean_over_seeds() -> None:
    steps = np.array([1, 2])
    values = [[0.1, 0.5], [0.2, 0.9], [0.6, 0.4]]
    band = seed_band([(steps, np.array(each)) for each in values])
    for place in range(2):
        column = [each[place] for each in values]
        assert band.mean[place] == pytest.approx(statistics.fmean(column))
        assert band.half_width is not None
        assert band.half_width[place] == pytest.approx(4.3027 * statistics.stdev(column) / math.sqrt(3))


def test_a_band_ends_with_the_seed_that_stopped_first() -> None:
    long, short = np.array([1, 2, 3, 4]), np.array([1, 2])
    band = seed_band([(long, np.array([1.0, 2, 3, 4])), (short, np.array([3.0, 4]))])
    assert band.steps.tolist() == [1, 2]
    assert band.mean.tolist() == [2, 3]


def test_one_seed_has_no_band() -> None:
    assert seed_band([(np.array([1]), np.array([0.5]))]).half_width is None


def test_statistics_skip_missing_and_null_numbers() -> None:
    found = statistics_of(columns({"a": 3.0}, {}, {"a": None}, {"a": -1.0}, {"a": 2.0}), "a")
    assert (found.count, found.null, found.first, found.last) == (3, 1, 3, 2)
    assert (found.smallest, found.smallest_step, found.largest, found.largest_step) == (-1, 2, 3, 1)


def test_statistics_of_nulls_alone_have_no_numbers() -> None:
    found = statistics_of(columns({"a": None}, {"a": None}), "a")
    assert (found.count, found.null) == (0, 2)
    assert math.isnan(found.first)
    assert math.isnan(found.largest)


def test_a_map_of_layers_keeps_spikes_and_missing_values() -> None:
    lines = [{"x/layer_03": float(i), "x/layer_101": None if i < 4 else 1.0, "x/mean": 0.0} for i in range(8)]
    lines[2]["x/layer_03"] = 99.0
    found = layer_map(columns(*lines), "x", limit=2)
    assert found is not None
    assert list(found.layers) == [3, 101]
    assert found.steps.tolist() == [1, 3]
    np.testing.assert_array_equal(found.values, [[99, 7], [np.nan, 1]])
    assert layer_map(columns(*lines), "y") is None


def test_values_by_mini_batch_are_over_all_steps() -> None:
    indexes, mean, low, high = by_mini_batch(columns({"a": 1.0}, {"a": 5.0}, {"a": 3.0}, {"a": None}), "a")
    assert (indexes.tolist(), mean.tolist(), low.tolist(), high.tolist()) == ([0, 1], [2, 5], [1, 5], [3, 5])


def test_means_of_a_step_are_over_its_mini_batches() -> None:
    steps, means = columns({"a": 1.0}, {"a": 5.0}, {"a": 3.0}, {"a": None}).by_step("a")
    assert (steps.tolist(), means.tolist()) == ([1, 2], [3, 3])
