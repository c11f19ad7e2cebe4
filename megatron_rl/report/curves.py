"""Arithmetic of curves: fewer points, bands over seeds, heat maps, and the statistics beside a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.report.loaded_runs import MetricColumns

POINTS = 600
"""A curve keeps at most about this many points."""
COLUMNS = 300
"""A heat map keeps at most this many columns."""

# t of the two-sided 95% interval by degrees of freedom, 1 to 30; above 30 the last is wide enough.
_T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def decimate(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the first, the last, the smallest and the largest point of each of points/4 equal parts of the curve.

    So no spike is lost. A curve of at most `points` points is returned as it is.
    """
    if len(x) <= points:
        return x, y
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(x)), points // 4):
        values = y[part]
        kept |= {int(part[0]), int(part[-1]), int(part[values.argmin()]), int(part[values.argmax()])}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


@dataclass(frozen=True)
class CurveStatistics:
    """Numbers beside a figure; steps are rollout steps. `null` counts lines in which the metric was not finite."""

    name: str
    count: int
    first: float
    last: float
    smallest: float
    smallest_step: int
    largest: float
    largest_step: int
    null: int


def statistics_of(columns: MetricColumns, name: str) -> CurveStatistics:
    values = columns.column(name)
    there = np.flatnonzero(np.isfinite(values))
    nulls = columns.nulls(name)
    if not len(there):
        return CurveStatistics(name, 0, math.nan, math.nan, math.nan, 0, math.nan, 0, nulls)
    found = values[there]
    low, high = there[found.argmin()], there[found.argmax()]
    return CurveStatistics(
        name,
        len(there),
        float(found[0]),
        float(found[-1]),
        float(values[low]),
        int(columns.steps[low]),
        float(values[high]),
        int(columns.steps[high]),
        nulls,
    )


@dataclass(frozen=True)
class SeedBand:
    """Mean over seeds with the 95% interval of Student's t; [steps] each. One seed has no interval."""

    steps: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray | None


def seed_band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> SeedBand:
    """Band of (steps, values) of several seeds, over the steps that all of them have.

    A seed that stopped early ends the band, because the mean of the seeds that are left would be a mean of survivors.
    """
    shared = curves[0][0]
    for steps, _ in curves[1:]:
        shared = np.intersect1d(shared, steps)
    values = np.array([y[np.isin(x, shared)] for x, y in curves])
    mean = values.mean(0)
    if len(curves) < 2:
        return SeedBand(shared, mean, None)
    error = values.std(0, ddof=1) / math.sqrt(len(curves))
    return SeedBand(shared, mean, student_t95(len(curves) - 1) * error)


def student_t95(freedom: int) -> float:
    """0.975 quantile of Student's t distribution."""
    return _T95[min(freedom, len(_T95)) - 1]


@dataclass(frozen=True)
class LayerMap:
    """Heat map: values [layers, columns], the layers' global numbers, and the first step of each column."""

    layers: Sequence[int]
    steps: np.ndarray
    values: np.ndarray


def layer_map(columns: MetricColumns, name: str, limit: int = COLUMNS) -> LayerMap | None:
    """`name`/layer_NN over steps; None if there are no layers. A column has the largest value of its lines, so that no
    spike is lost; NaN without a value."""
    prefix = f"{name}/layer_"
    numbers = [each.removeprefix(prefix) for each in columns.names if each.startswith(prefix)]
    layers = sorted(int(number) for number in numbers if number.isdecimal())
    if not layers:
        return None
    table = np.array([columns.column(f"{prefix}{layer:02d}") for layer in layers])
    steps = np.unique(columns.steps)
    parts = np.array_split(steps, min(limit, len(steps)))
    values = np.full((len(layers), len(parts)), np.nan)
    for place, part in enumerate(parts):
        lines = table[:, (columns.steps >= part[0]) & (columns.steps <= part[-1])]
        known = np.isfinite(lines).any(1)
        values[known, place] = np.nanmax(lines[known], axis=1)
    return LayerMap(layers, np.array([part[0] for part in parts]), values)


def by_mini_batch(columns: MetricColumns, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mini-batch indexes, mean, smallest and largest over all steps) of the lines in which the metric is a number."""
    values = columns.column(name)
    there = np.isfinite(values)
    indexes = np.unique(columns.mini_batches[there])
    parts = [values[there & (columns.mini_batches == index)] for index in indexes]
    summary = np.array([(part.mean(), part.min(), part.max()) for part in parts]).reshape(-1, 3)
    return indexes, summary[:, 0], summary[:, 1], summary[:, 2]
