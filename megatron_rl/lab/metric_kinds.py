"""Kinds of metrics, and the statistics that each kind is written with. Imports nothing, so readers need no torch."""

from __future__ import annotations

from enum import Enum

QUANTILES = {"p1": 0.01, "p50": 0.5, "p99": 0.99}
TAIL_STATISTICS = ("mean", "std", "min", "max", *QUANTILES, "not_finite")
LAYER = "layer_{nn}"
"""Statistic of one layer; nn is the layer's global number, with at least two digits."""


class Kind(Enum):
    """Statistics that are kept of a metric and reported."""

    SUM = "sum"
    MEAN = "mean"
    """Mean of numbers; of truth values, the fraction that is true."""
    TAIL = "tail"
    """Mean, std, min, max and QUANTILES."""
    RATIO = "ratio"
    """TAIL of w = exp(value), with chi2 = E[w^2] - 1 and ess = E[w]^2 / E[w^2]. Ratios are added as logs, so that
    quantiles near 1 are precise: within 1e-6 if |w - 1| < 1e-4."""
    LAYERS = "layers"
    """One number for each MoE layer, with the mean, min and max of these numbers."""
    VALUE = "value"
    """One number of the whole step, such as the learning rate."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """What follows `name/` in the names that are written; empty if the metric is written under its own name."""
        return _STATISTICS.get(self.value, ())


_STATISTICS: dict[str, tuple[str, ...]] = {
    "tail": TAIL_STATISTICS,
    "ratio": (*TAIL_STATISTICS, "chi2", "ess"),
    "layers": ("mean", "min", "max", LAYER),
}
