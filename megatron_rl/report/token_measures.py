"""Measures of a token that `megatron-rl inspect` colours: log-prob, ratio, mismatch and expert change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Columns = Mapping[str, np.ndarray]
"""[n] by column of lab/token_records.py; columns that a step does not have are absent."""

RATIO_EDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
CHANGE_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Measure:
    key: str
    title: str
    meaning: str
    of: Callable[[Columns], np.ndarray | None]
    """[n] from columns; None if they do not hold it."""
    edges: tuple[float, ...]
    """Bounds between colours, from the palest to the darkest."""
    has_sign: bool = False
    """Whether values of both signs are bad, each with its own colour."""
    falls: bool = False
    """Whether small values are bad."""
    may_lack: bool = False
    """Whether a trained token may be without a value. If not, a value that is not finite is the worst of all."""

    def badness(self, values: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """[n]: how bad each value is, at least 0; 0 without a value, and infinite for a lost one."""
        bad = np.abs(values) if self.has_sign else -values if self.falls else values
        lost = ~np.isfinite(values) & trained & (not self.may_lack)
        return np.where(lost, np.inf, np.nan_to_num(bad, nan=0.0, posinf=np.inf).clip(min=0.0))

    def levels(self, values: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """[n] int: how many edges each badness is above, 0 for no colour; negative for the other sign."""
        found = (self.badness(values, trained)[:, None] > np.array(self.edges)).sum(-1)
        return np.where(self.has_sign & (np.nan_to_num(values) < 0), -found, found)


def _difference(*pairs: tuple[str, str]) -> Callable[[Columns], np.ndarray | None]:
    """Returns the difference of the first pair of columns that is there."""
    return lambda columns: next((columns[a] - columns[b] for a, b in pairs if a in columns and b in columns), None)


def _first(*names: str) -> Callable[[Columns], np.ndarray | None]:
    return lambda columns: next((columns[name] for name in names if name in columns), None)


MEASURES = (
    Measure(
        "ratio",
        "ratio",
        "log r = log pi_theta - log pi_old; log pi_theta - log mu in a run in which mu stands for pi_old",
        _difference(("logprob", "old_logprob"), ("logprob", "rollout_logprob")),
        RATIO_EDGES,
        has_sign=True,
    ),
    Measure(
        "mismatch",
        "mismatch",
        "log rho = log pi_old - log mu",
        _difference(("old_logprob", "rollout_logprob")),
        RATIO_EDGES,
        has_sign=True,
    ),
    Measure(
        "logprob",
        "log-prob",
        "log pi_theta; log mu of a step whose tokens were not recorded",
        _first("logprob", "rollout_logprob"),
        (0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
        falls=True,
    ),
    Measure(
        "change",
        "expert change",
        "share of the routers' own choices that differ between pi_old and pi_theta, mean over layers",
        _first("expert_change/old_policy/live"),
        CHANGE_EDGES,
        may_lack=True,
    ),
    Measure(
        "rollout_change",
        "expert change from rollout",
        "share of the experts that differ between mu and the routers' own choices under pi_old, mean over layers",
        _first("expert_change/rollout_old/live"),
        CHANGE_EDGES,
        may_lack=True,
    ),
)
"""In the order of the page. The first one that a step has is shown first."""
