"""What a loss reads and what it gives back, for one packed micro-batch.

Shapes: T packed positions, padding and prompts included; M of them masked in; S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The whole sequences of one micro-batch, gathered over context parallelism.

    What stands at positions outside `loss_mask` is never read. Raises ValueError when a shape or dtype
    differs.
    """

    logprobs: Tensor
    """[T] float, log pi_theta of the token at each position; it and top_logprobs alone carry a gradient."""
    old_logprobs: Tensor
    """[T] float, log pi_old."""
    rollout_logprobs: Tensor
    """[T] float, log mu."""
    advantages: Tensor
    """[T] float; constant over a response but for those of a critic."""
    loss_mask: Tensor
    """[T] bool, True where the policy generated the token and it is to be trained on."""
    sequence_ids: Tensor
    """[T] int64 in 0 .. S - 1."""
    num_sequences: int
    """S; sequences without a masked-in token may be among them."""
    reference_logprobs: Tensor | None = None
    """[T] float, log pi_ref; None where there is no reference policy."""
    router_shift: Tensor | None = None
    """[T] float in 0 .. 1: how little the routers have moved since pi_old (routing/shift.py), not floored yet; 1 where
    they have not. None: 1 everywhere."""
    top_logprobs: Tensor | None = None
    """[T, k] float, log pi_theta of mu's k most likely tokens; carries a gradient. None without score centering."""
    top_rollout_logprobs: Tensor | None = None
    """[T, k] float, log mu of these tokens; -inf for one that is missing."""
    prompts: Sequence[int] | None = None
    """[S] number of each sequence's prompt, as in Denominators.prompt_tokens; read by the prompt-mean aggregation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            shape, expected = tuple(value.shape), tuple(self.logprobs.shape)
            if field.name in ("top_logprobs", "top_rollout_logprobs"):
                if shape[:-1] != expected:
                    raise ValueError(f"{field.name}: shape {shape}, expected {(*expected, 'k')}")
            elif shape != expected:
                raise ValueError(f"{field.name}: shape {shape}, expected that of logprobs, {expected}")
        for name, dtype in (("loss_mask", torch.bool), ("sequence_ids", torch.int64)):
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name}: dtype {getattr(self, name).dtype}, expected {dtype}")
        if self.prompts is not None and len(self.prompts) != self.num_sequences:
            raise ValueError(f"prompts: {len(self.prompts)}, expected one for each of {self.num_sequences} sequences")


@dataclass(frozen=True, eq=False)
class LossOutputs:
    loss: Tensor
    """Scalar: this micro-batch's share. Summed over micro-batches and data-parallel ranks it is the loss."""


@dataclass(frozen=True, eq=False)
class Clipping:
    """Tokens whose ratio left its band, [M] bool each. Active: `min` and `mask` take their gradient away."""

    below: Tensor
    """Ratio under 1 - low, whatever the advantage."""
    above: Tensor
    """Ratio over 1 + high, whatever the advantage."""
    active_low: Tensor
    """Below, with a negative advantage."""
    active_high: Tensor
    """Above, with a positive advantage."""
    active_dual: Tensor | None
    """Over the dual clip, with a negative advantage; None where there is no dual clip."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What the mismatch between trainer and rollout engine does to each token's term, [M] each, detached."""

    factor: Tensor
    """Float; 0 where the term is dropped."""
    masked: Tensor | None = None
    """Bool, the terms that are dropped; None for a correction that drops none."""
    truncated: Tensor | None = None
    """Bool, where the weight was cut down to its bound; None for a correction that cuts none."""


@dataclass(frozen=True, eq=False)
class CenteringValues:
    """Score centering at each token, [M] float each, detached. H is the head, mu's most likely tokens."""

    rollout_mass: Tensor
    """Q_H, the probability of the head under mu."""
    policy_mass: Tensor
    """P_H, its probability under pi_theta."""
    alpha: Tensor
    """(1 - Q_H)/(1 - P_H), neither of them below what is rounding."""
    drift: Tensor
    """Half the L1 norm, in the logits, of the gradient that is taken off."""
    score: Tensor
    """Half the L1 norm, in the logits, of the gradient of the sampled token's w log p."""


@dataclass(frozen=True, eq=False)
class LossValues:
    """Detached, for metrics."""

    log_sequence_ratio: Tensor
    """[S] log s of GSPO, whatever the objective's ratio, with its denominator; 0 without masked-in tokens."""
    clipping: Clipping
    correction: Correction
    floored: Tensor | None = None
    """[M] bool, where the router shift was raised to its floor; None for an objective without one."""
    centering: CenteringValues | None = None
    """None for an objective without score centering."""


@dataclass(frozen=True, eq=False)
class PolicyLossOutputs(LossOutputs):
    values: LossValues
