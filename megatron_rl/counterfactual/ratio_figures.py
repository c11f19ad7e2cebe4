"""Figures of importance ratios, exact over all tokens of a batch. Pure functions of NumPy arrays, in float64.

log r    log pi_theta - log pi_old, by token: staleness
log s    mean of log r over a response [2507.18071, equation 7]
log rho  log pi_old - log mu, by token: mismatch
omega    r * rho
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

QUANTILES = {"p1": 0.01, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
TRIM = 0.01
"""Share of the tokens that the trimmed variance leaves out at each end."""
SHARES = ("log_r/trimmed_variance", "kl/old_policy/k3", "abs_log_s/mean")
"""Figures whose part that routing explains is 1 - figure(routing) / figure(none)."""


def ratio_figures(new: Doubles, old: Doubles, mu: Doubles, lengths: Sequence[int]) -> dict[str, float]:
    """Figures of one routing. new, old and mu, [N] log-probs of pi_theta, pi_old and the rollout engine, response after
    response; lengths [S] are |y|, at least 1 each, and sum to N > 0."""
    log_r, log_rho = new - old, old - mu
    log_s = np.add.reduceat(log_r, np.cumsum([0, *lengths[:-1]])) / np.asarray(lengths)
    gap, size = np.abs(log_rho), np.abs(log_s)
    return {
        "log_r/mean": float(log_r.mean()),
        "log_r/min": float(log_r.min()),
        **{f"log_r/{name}": _quantile(log_r, q) for name, q in QUANTILES.items()},
        "log_r/max": float(log_r.max()),
        "log_r/variance": float(log_r.var()),
        "log_r/trimmed_variance": trimmed_variance(log_r),
        "abs_log_r/p50": _quantile(np.abs(log_r), 0.5),
        "abs_log_r/p99": _quantile(np.abs(log_r), 0.99),
        "abs_log_s/mean": float(size.mean()),
        "abs_log_s/p50": _quantile(size, 0.5),
        "abs_log_s/p99": _quantile(size, 0.99),
        "kl/old_policy/k3": kl_k3(log_r),
        "kl/rollout_old/k3": kl_k3(log_rho),
        "abs_logprob_gap/mean": float(gap.mean()),
        "abs_logprob_gap/p99": _quantile(gap, 0.99),
        "abs_logprob_gap/max": float(gap.max()),
        "rho/beyond_2": float((gap > np.log(2)).mean()),
        "rho/beyond_10": float((gap > np.log(10)).mean()),
        "ratio/ess": ess(log_r),
        "rho/ess": ess(log_rho),
        "omega/ess": ess(log_r + log_rho),
    }


def trimmed_variance(values: Doubles, trim: float = TRIM) -> float:
    """Variance without the floor(trim * n) smallest and as many largest of n values: Var(r) itself is ruled by its
    tails."""
    cut = int(trim * len(values))
    return float(np.sort(values)[cut : len(values) - cut].var())


def kl_k3(log_ratio: Doubles) -> float:
    """Mean of k3 = q/p - 1 - log(q/p), from samples of p (http://joschu.net/blog/kl-approx.html)."""
    return float((np.expm1(log_ratio) - log_ratio).mean())


def ess(log_weight: Doubles) -> float:
    """Effective sample size as a share of the tokens: E[w]^2 / E[w^2]."""
    weight = np.exp(log_weight - log_weight.max())  # a constant factor cancels
    return float(weight.mean() ** 2 / np.square(weight).mean())


def explained(before: float, after: float) -> float | None:
    """1 - after / before; None if there was nothing to explain."""
    return 1 - after / before if before > 0 else None


def _quantile(values: Doubles, q: float) -> float:
    """Returns a value of the data, as the metrics of a run do (inverted CDF)."""
    return float(np.quantile(values, q, method="inverted_cdf"))
