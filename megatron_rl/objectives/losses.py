"""The clip and the aggregation of an objective. Shapes as in megatron_rl.objectives.inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rl.config.schema import ClipConfig, ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.inputs import Clipping
from megatron_rl.objectives.ratios import Tokens


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: ClipConfig) -> tuple[Tensor, Clipping]:
    """[M] min(r A, clip(r, 1 - low, 1 + high) A) [1707.06347, equation 7] for log_ratio and advantages [M].

    With the dual clip [1912.09729, equation 5], not below dual * A where A < 0. Where a clip is active the
    value is a constant: no gradient. Elsewhere the gradient in log_ratio is r A.
    """
    where = clipping(log_ratio.detach(), advantages, clip)
    bounded = where.active_low | where.active_high
    bound = torch.full_like(log_ratio, 1 + clip.high).masked_fill(where.active_low, 1 - clip.low)
    if clip.dual is not None and where.active_dual is not None:
        bounded = bounded | where.active_dual
        bound = bound.masked_fill(where.active_dual, clip.dual)
    # Not torch.minimum: the gradient of a clipped ratio that overflows would be 0 * inf.
    ratio = torch.where(bounded, bound, log_ratio.masked_fill(bounded, 0.0).exp())
    return ratio * advantages, where


def clipping(log_ratio: Tensor, advantages: Tensor, clip: ClipConfig) -> Clipping:
    below = log_ratio < math.log1p(-clip.low)
    above = log_ratio > math.log1p(clip.high)
    return Clipping(
        below=below,
        above=above,
        active_low=below & (advantages < 0),
        active_high=above & (advantages > 0),
        active_dual=None if clip.dual is None else (log_ratio > math.log(clip.dual)) & (advantages < 0),
    )


def token_weights(tokens: Tokens, config: ObjectiveConfig, denominators: Denominators) -> Tensor:
    """[M] what each token's term is multiplied by: the aggregation and the mini-batch's denominator in one.

    token-mean is DAPO [2503.14476, equation 8], seq-mean-token-mean GRPO [2402.03300, equation 3],
    constant-length Dr.GRPO [2503.20783]. Raises ValueError when constant-length has no constant_length.
    """
    sequences = denominators.sequences
    each = torch.ones_like(tokens.logprobs)
    match config.aggregation:
        case "token-mean":
            return each / denominators.tokens
        case "seq-mean-token-mean":
            return each / (tokens.lengths[tokens.sequence_ids] * sequences)
        case "seq-mean-token-sum":
            return each / sequences
        case "constant-length":
            if config.constant_length is None:
                raise ValueError("objective.constant_length: not set, needed by aggregation: constant-length")
            return each / (config.constant_length * sequences)
