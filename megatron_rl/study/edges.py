"""Finds where stability ends along a grid. Pure; imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.power_law import PowerLaw, fit


@dataclass(frozen=True)
class Edge:
    """Index of the largest stable value along a grid; -1 if none is stable."""

    index: int
    values: tuple[float, ...]

    @property
    def is_top(self) -> bool:
        """Whether the grid ends before stability does."""
        return self.index == len(self.values) - 1

    @property
    def is_inside(self) -> bool:
        return self.index >= 0 and not self.is_top

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which indices the edge lies: equal if it is inside, and unbounded beyond an end of the grid."""
        if not self.values:
            return -math.inf, math.inf
        return self.index if self.index >= 0 else -math.inf, math.inf if self.is_top else self.index

    @property
    def spread(self) -> float:
        """Standard deviation of log(where stability ends), which is anywhere between an edge inside and the next value
        of the grid."""
        return math.log(self.values[self.index + 1] / self.values[self.index]) / math.sqrt(12)


def find_edge(results: Sequence[RunOutcome], along: str) -> Edge:
    """The edge of one seed's runs. A value of `along` is stable if all its runs are done; without values if a run was
    left out."""
    stable: dict[float, bool] = {}
    for each in results:
        if each.status == "left out":
            return Edge(-1, ())
        if along in each.at:
            value = float(each.at[along])
            stable[value] = stable.get(value, True) and each.status == "done"
    values = sorted(stable)
    unstable = [index for index, value in enumerate(values) if not stable[value]]
    return Edge(min(unstable, default=len(values)) - 1, tuple(values))


def edge_slope(edges: Mapping[float, Edge]) -> PowerLaw | None:
    """The line of log edge on log x; None if an edge is not inside of its grid.

    Its error is the larger of the fit's and the one that the grid's steps make.
    """
    if not all(edge.is_inside for edge in edges.values()):
        return None
    line = fit(list(edges), [edge.values[edge.index] for edge in edges.values()])
    if line is None:
        return None
    log_x = [math.log(x) for x in edges]
    distances = [x - statistics.fmean(log_x) for x in log_x]
    moved = math.hypot(*(d * edge.spread for d, edge in zip(distances, edges.values(), strict=True)))
    of_grid = moved / sum(d * d for d in distances)
    return PowerLaw(line.slope, max(of_grid, line.error or 0.0))
