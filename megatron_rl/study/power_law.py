"""A straight line through points on logarithmic axes. Pure; imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """The least-squares line of log y on log x."""

    slope: float
    error: float | None
    """Standard error of the slope, from the distances of the points to the line; None with two points, which lie on
    it."""


def fit(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Returns None with fewer than two different x, or a number that is not positive."""
    if min([*x, *y], default=0.0) <= 0 or len(set(x)) < 2:
        return None
    log_x, log_y = [math.log(each) for each in x], [math.log(each) for each in y]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    if len(x) < 3:
        return PowerLaw(slope, None)
    mean = statistics.fmean(log_x)
    squares = sum((b - intercept - slope * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    return PowerLaw(slope, math.sqrt(squares / (len(x) - 2) / sum((a - mean) ** 2 for a in log_x)))
