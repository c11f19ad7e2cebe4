"""The loss of PPO's critic over one packed micro-batch. No distributed code."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_rl.data.schedule import Denominators


@dataclass(frozen=True, eq=False)
class ValueInputs:
    """T packed positions; what stands outside `loss_mask` is never read. Raises ValueError when a shape differs."""

    values: Tensor
    """[T] float, V of the state before each token; the only one that carries a gradient."""
    old_values: Tensor
    """[T] float, V before the first update."""
    returns: Tensor
    """[T] float, what V is to become: A + V_old."""
    loss_mask: Tensor
    """[T] bool."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value.shape != self.values.shape:
                raise ValueError(f"{field.name}: shape {tuple(value.shape)}, expected that of values")


@dataclass(frozen=True, eq=False)
class ValueLossOutputs:
    loss: Tensor
    """Scalar: this micro-batch's share of a mean over the mini-batch's masked-in tokens."""
    kept: Tensor
    """[M] int64, the masked-in positions, in order."""
    clipped: Tensor
    """[M] bool, masked-in tokens on which the clip takes the gradient away."""


def value_loss(inputs: ValueInputs, clip: float | None, denominators: Denominators) -> ValueLossOutputs:
    """.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), mean over tokens: the PPO value loss."""
    kept = inputs.loss_mask.nonzero().squeeze(1)
    values = inputs.values[kept]
    old, returns = inputs.old_values[kept].detach(), inputs.returns[kept].detach()
    errors = (values - returns).square()
    clipped = torch.zeros_like(kept, dtype=torch.bool)
    if clip is not None:
        bounded = torch.minimum(torch.maximum(values, old - clip), old + clip)
        bounded_errors = (bounded - returns).square()
        clipped = (bounded_errors > errors).detach()
        errors = torch.maximum(errors, bounded_errors)
    return ValueLossOutputs(0.5 * errors.sum() / max(denominators.tokens, 1), kept, clipped)
