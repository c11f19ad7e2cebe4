"""Merges sums, means and tails of values that are spread over micro-batches and ranks, without loss.

The state is one vector to sum over ranks and one to maximise, so an ordinary all-reduce merges it. Its shape depends on
the names of the metrics only, so ranks without values take part with an empty state.

Quantiles come from counts on a fixed grid of bins that grow geometrically away from zero on both sides, as in DDSketch
[1908.10693]. Each bin keeps its count and its sum, and stands for its mean, so quantiles of few values are exact.
"""

from __future__ import annotations

import functools
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
    """Place of a metric's state: sums[start : start + SIZES[kind]], and pair `number` of the maxima."""

    kind: Kind
    start: int
    number: int


@functools.lru_cache(maxsize=256)
def _places(slots: Sequence[MetricSlot], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns where the states of these metrics start in `sums`, and their numbers, [n] int64 each."""
    starts, numbers = torch.tensor([(slot.start, slot.number) for slot in slots], device=device).T.contiguous()
    return starts, numbers


class MetricAccumulator:
    """The metrics of one optimizer step or one rollout, by name.

    To merge ranks with different samples, all-reduce `sums` with SUM and `maxima` with MAX, both float64, in place.
    Do not merge ranks with the same samples (tensor and context parallelism): they would count twice.
    """

    def __init__(self, kinds: Mapping[str, Kind], device: torch.device | str = "cpu") -> None:
        self.kinds = dict(kinds)
        self._slots: dict[str, MetricSlot] = {}
        size = 0
        for number, (name, kind) in enumerate(kinds.items()):
            self._slots[name] = MetricSlot(kind, size, number)
            size += SIZES[kind]
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.maxima = torch.full((2 * len(kinds),), -math.inf, dtype=torch.float64, device=device)

    def add(self, name: str, values: Tensor) -> None:
        """Adds values of any shape and dtype. Raises KeyError if the name was not declared."""
        self.add_all({name: values})

    @torch.no_grad()
    def add_all(self, values: Mapping[str, Tensor]) -> None:
        """Adds values of any shape and dtype to each metric. Raises KeyError if a name was not declared.

        Metrics of one kind with equally many values are added at once, and ratios with tails: with few values an
        operation costs as much as the same operation for each metric.
        """
        alike: dict[tuple[Kind, int], list[str]] = {}
        for name, of_metric in values.items():
            kind = self._slots[name].kind
            alike.setdefault((Kind.TAIL if kind is Kind.RATIO else kind, of_metric.numel()), []).append(name)
        for (kind, count), names in alike.items():
            if not count:
                continue
            names.sort(key=lambda name: self._slots[name].kind is not Kind.RATIO)
            rows = torch.stack([values[name].detach().flatten().to(self.sums) for name in names])
            if kind is Kind.SUM:
                self.sums.index_add_(0, self._places_of(names)[0], rows.sum(-1))
            elif kind is Kind.MEAN:
                self.add_sums(names, rows.sum(-1), rows.new_full((len(rows),), count))
            else:
                self._add_tails(names, rows, sum(self._slots[name].kind is Kind.RATIO for name in names))

    @torch.no_grad()
    def add_sums(self, names: Sequence[str], sums: Tensor, counts: Tensor) -> None:
        """Adds to means, [n] each: the sum of each one's values and their number."""
        if any(self._slots[name].kind is not Kind.MEAN for name in names):
            raise ValueError(f"{', '.join(names)}: expected means")
        starts, _ = self._places_of(names)
        self.sums.index_add_(0, starts, sums.to(self.sums))
        self.sums.index_add_(0, starts + 1, counts.to(self.sums))

    def _places_of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        return _places(tuple(self._slots[name] for name in names), self.sums.device)

    def _add_tails(self, names: Sequence[str], values: Tensor, ratios: int) -> None:
        """Adds a row of values, [n, values of each], to each tail; the first `ratios` of them are of logs of ratios."""
        finite = values.isfinite()
        ones = finite.to(values)
        kept = values.where(finite, 0.0)
        natural = torch.cat([kept[:ratios].exp(), kept[ratios:]]) * ones
        starts, numbers = self._places_of(names)
        bins = (starts[:, None] + bin_of(kept)).flatten()
        missing = values.shape[1] - ones.sum(-1)
        self.sums.index_add_(0, bins, ones.flatten())
        self.sums.index_add_(0, bins + BINS, kept.flatten())
        for place, found in ((TOTAL, natural.sum(-1)), (SQUARES, natural.square().sum(-1)), (NOT_FINITE, missing)):
            self.sums.index_add_(0, starts + place, found)
        extremes = torch.stack([-kept.where(finite, math.inf).amin(-1), kept.where(finite, -math.inf).amax(-1)], -1)
        maxima = self.maxima.view(-1, 2)
        maxima[numbers] = torch.maximum(maxima[numbers], extremes)

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
                low, high = maxima.view(-1, 2)[slot.number].tolist()
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
