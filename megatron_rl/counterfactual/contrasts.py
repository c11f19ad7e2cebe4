"""Compares the mismatch of the tokens that visit an expert with that of all others. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_rl.counterfactual.ratio_figures import Doubles


@dataclass(frozen=True)
class ExpertContrast:
    """The mismatch of the tokens that visit an expert, against that of all other tokens."""

    layer: int
    expert: int
    tokens: int
    """Tokens that visit it."""
    mean: float
    """Mean |log pi_old - log mu| of these tokens, in nats."""
    others: float
    t: float
    """Welch's t: the difference of the two means over its standard error."""


def expert_contrasts(sums: Tensor, values: Doubles, layers: Sequence[int]) -> list[ExpertContrast]:
    """Compares each expert's tokens with all others by Welch's t [Biometrika 34, 1947].

    sums [3, layers, experts]: tokens, values and squares. An expert that fewer than two tokens visit, or all but fewer
    than two, is left out.
    """
    whole = np.array([len(values), values.sum(), np.square(values).sum()])
    found = []
    for number, layer in enumerate(layers):
        for expert in range(sums.shape[2]):
            inside = sums[:, number, expert].numpy()
            outside = whole - inside
            if min(inside[0], outside[0]) < 2:
                continue
            (mean, error), (others, its_error) = _moments(inside), _moments(outside)
            spread = math.sqrt(error + its_error)
            t = (mean - others) / spread if spread else 0.0
            found.append(ExpertContrast(layer, expert, int(inside[0]), mean, others, t))
    return sorted(found, key=lambda each: -each.t)


def _moments(sums: Doubles) -> tuple[float, float]:
    """Returns the mean, and the square of its standard error."""
    count, total, squares = sums.tolist()
    mean = total / count
    return mean, max(squares - count * mean * mean, 0.0) / (count - 1) / count
