"""Merges sums, means and tails of values that are spread over micro-batches and ranks, without loss.

The state is one vector to sum over ranks and one to maximise, so an ordinary all-reduce merges it. Its shape depends on
the names of the metrics only, so ranks without values take part with an empty state.

Quantiles come from counts on a fixed grid of bins that grow geometrically away from zero on both sides, as in DDSketch
[1908.10693]. Each bin keeps its count and its sum, and stands for its mean, so quantiles of few values are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.lab.metric_kinds import QUANTILES, Kind

GROWTH = 1.01
"""A quantile is within 1% of the exact one, which is a value of the data (inverted CDF) ..."""
SMALLEST = 1e-7
"""... or within twice this bound, if the exact quantile is closer to zero than this bound."""
LARGEST = 1e7
"""All values farther from zero than this share a bin."""
SIDE = math.ceil(math.log(LARGEST / SMALLEST) / math.log(GROWTH))
BINS = 2 * SIDE + 1

# The state of a tail is the count and sum of each bin, then these.
TOTAL, SQUARES, NOT_FINITE = 2 * BINS, 2 * BINS + 1, 2 * BINS + 2
TAIL_SIZE = 2 * BINS + 3
SIZES = {Kind.SUM: 1, Kind.MEAN: 2, Kind.TAIL: TAIL_SIZE, Kind.RATIO: TAIL_SIZE}
"""Numbers in the state of each kind that can be accumulated."""


def bin_of(values: Tensor) -> Tensor:
    """Bin numbers, 0 to BINS - 1, of finite float64 values."""
    steps = (values.abs() / SMALLEST).log() / math.log(GROWTH)
    return (SIDE + values.sign() * steps.ceil().clamp(0, SIDE)).long()


@dataclass(frozen=True)
class MetricSlot:
    """Place of a metric's state: sums[start : start + SIZES[kind]], maxima[extremes : extremes + 2]."""

    kind: Kind
    start: int
    extremes: int


class MetricAccumulator:
    """The metrics of one optimizer step or one rollout, by name.

    To merge ranks with different samples, all-reduce `sums` with SUM and `maxima` with MAX, both float64, in place.
    Do not merge ranks with the same samples (tensor and context parallelism): they would count twice.
    """

    def __init__(self, kinds: Mapping[str, Kind], device: torch.device | str = "cpu") -> None:
        self.kinds = dict(kinds)
        self._slots: dict[str, MetricSlot] = {}
        self._starts: dict[tuple[str, ...], Tensor] = {}
        size = 0
        for position, (name, kind) in enumerate(kinds.items()):
            self._slots[name] = MetricSlot(kind, size, 2 * position)
            size += SIZES[kind]
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.maxima = torch.full((2 * len(kinds),), -math.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, name: str, values: Tensor) -> None:
        """Adds values of any shape and dtype. Raises KeyError if the name was not declared."""
        slot = self._slots[name]
        values = values.detach().flatten().to(self.sums)
        if not len(values):
            return
        state = self.sums[slot.start : slot.start + SIZES[slot.kind]]
        if slot.kind is Kind.SUM:
            state += values.sum()
        elif slot.kind is Kind.MEAN:
            state[0] += values.sum()
            state[1] += len(values)
        else:
            self._add_tail(slot, state, values)

    @torch.no_grad()
    def add_sums(self, names: Sequence[str], sums: Tensor, counts: Tensor) -> None:
        """Adds to means, [n] each: the sum of each one's values and their number."""
        if tuple(names) not in self._starts:
            if any(self._slots[name].kind is not Kind.MEAN for name in names):
                raise ValueError(f"{', '.join(names)}: expected means")
            starts = torch.tensor([self._slots[name].start for name in names], device=self.sums.device)
            self._starts[tuple(names)] = starts
        starts = self._starts[tuple(names)]
        self.sums.index_add_(0, starts, sums.to(self.sums))
        self.sums.index_add_(0, starts + 1, counts.to(self.sums))

    def _add_tail(self, slot: MetricSlot, state: Tensor, values: Tensor) -> None:
        finite = values.isfinite()
        ones = finite.to(values)
        kept = values.where(finite, 0.0)
        bins = bin_of(kept)
        natural = (kept.exp() if slot.kind is Kind.RATIO else kept) * ones
        state.index_add_(0, bins, ones)
        state.index_add_(0, BINS + bins, kept)
        state[TOTAL] += natural.sum()
        state[SQUARES] += natural.square().sum()
        state[NOT_FINITE] += len(values) - ones.sum()
        lowest = kept.where(finite, math.inf).min()
        highest = kept.where(finite, -math.inf).max()
        extremes = self.maxima[slot.extremes : slot.extremes + 2]
        extremes.copy_(torch.maximum(extremes, torch.stack([-lowest, highest])))

    def merge(self, other: MetricAccumulator) -> None:
        """Adds the values of another accumulator, as the all-reduce does between processes."""
        if list(other._slots.items()) != list(self._slots.items()):
            raise ValueError("metrics: cannot merge accumulators of different metrics")
        self.sums += other.sums.to(self.sums)
        self.maxima.copy_(torch.maximum(self.maxima, other.maxima.to(self.maxima)))

    def finalize(self) -> dict[str, float]:
        """Numbers by name; a tail gives `name/mean`, `name/p99`, ... A mean or tail without values is omitted.

        A tail omits values that are not finite and counts them under `name/not_finite`, if there are any.
        """
        sums, maxima = self.sums.cpu(), self.maxima.cpu()
        report: dict[str, float] = {}
        for name, slot in self._slots.items():
            state = sums[slot.start : slot.start + SIZES[slot.kind]]
            if slot.kind is Kind.SUM:
                report[name] = float(state)
            elif slot.kind is Kind.MEAN:
                total, count = state.tolist()
                if count:
                    report[name] = total / count
            else:
                low, high = maxima[slot.extremes : slot.extremes + 2].tolist()
                tail = tail_statistics(state, -low, high, slot.kind)
                report |= {f"{name}/{statistic}": value for statistic, value in tail.items()}
        return report


def tail_statistics(state: Tensor, lowest: float, highest: float, kind: Kind) -> dict[str, float]:
    """Statistics of one tail from its state [TAIL_SIZE] and its exact extremes, by their short names."""
    counts, sums = state[:BINS], state[BINS:TOTAL]
    total, squares, not_finite = state[TOTAL:].tolist()
    report = {"not_finite": not_finite} if not_finite else {}
    count = float(counts.sum())
    if not count:
        return report
    cumulative = counts.cumsum(0)
    points = {"min": lowest, "max": highest}
    for statistic, fraction in QUANTILES.items():
        rank = max(math.ceil(fraction * count), 1)
        found = int(torch.searchsorted(cumulative, torch.tensor(float(rank), dtype=torch.float64)))
        # The mean of equal values can round to a number outside of their range.
        points[statistic] = min(max(float(sums[found] / counts[found]), lowest), highest)
    mean, square = total / count, squares / count
    if kind is Kind.RATIO:
        points = {statistic: _exp(value) for statistic, value in points.items()}
        report |= {"chi2": square - 1, "ess": mean * mean / square}
    spread = math.sqrt(max(square - mean * mean, 0.0))
    return {"mean": mean, "std": spread, **points, **report}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
