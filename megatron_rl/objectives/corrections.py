"""Corrections for the mismatch between trainer and rollout engine. Shapes as in megatron_rl.objectives.inputs.

All but `mis` leave the denominators as they are: a dropped term counts as 0. What `mis` rejects leaves them too, as if
it had been masked out; its caller takes them from `kept_lengths`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.config.switches import IcePop, Mis, NoCorrection, ObjectiveConfig, SequenceMask, Tis
from megatron_rl.objectives.inputs import Correction, LossInputs
from megatron_rl.objectives.ratios import Tokens

Level = Literal["token", "sequence", "geometric"]
Denominator = Literal["old", "rollout"]


def correct(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    """What the correction makes of each token's term."""
    match config.correction:
        case NoCorrection():
            return Correction(torch.ones_like(tokens.old_logprobs))
        case Tis() as tis:
            return truncated(tokens, tis, config.denominator)
        case Mis() | IcePop() as band:
            return banded(tokens, band, config.denominator)
        case SequenceMask() as mask:
            return sequence_masked(tokens, mask)


def leaves_denominators(config: ObjectiveConfig) -> bool:
    """Whether what the correction drops leaves |y_i| of the aggregation and the mini-batch's denominators."""
    return isinstance(config.correction, Mis)


def log_mismatch(tokens: Tokens, denominator: Denominator, level: Level) -> Tensor:
    """[M] log rho, or log omega if the ratio is against mu, at the level of the correction; detached."""
    policy = tokens.old_logprobs if denominator == "old" else tokens.logprobs.detach()
    log_rho = policy - tokens.rollout_logprobs
    match level:
        case "token":
            return log_rho
        case "sequence":
            return tokens.sequence_sum(log_rho)[tokens.sequence_ids]
        case "geometric":
            return tokens.sequence_mean(log_rho)[tokens.sequence_ids]


def truncated(tokens: Tokens, tis: Tis, denominator: Denominator) -> Correction:
    """TIS: rho -> min(rho, high)."""
    log_rho = log_mismatch(tokens, denominator, tis.level)
    high = math.log(tis.high)
    bounded = log_rho.clamp(max=high)
    # omega is in the ratio already: it only has to be brought down, not applied a second time.
    factor = bounded if denominator == "old" else bounded - log_rho
    return Correction(factor.exp(), truncated=log_rho > high)


def banded(tokens: Tokens, band: Mis | IcePop, denominator: Denominator) -> Correction:
    """MIS, and IcePop [2510.18855, equation 3]: rho where low <= rho <= high, else 0. IcePop's band may be another
    where A < 0, as in MiMo-V2.6 [2610.11959]."""
    log_rho = log_mismatch(tokens, denominator, band.level if isinstance(band, Mis) else "token")
    masked = _outside(log_rho, band.low, band.high)
    if isinstance(band, IcePop):
        low, high = band.negative_low or band.low, band.negative_high or band.high
        masked = torch.where(tokens.advantages < 0, _outside(log_rho, low, high), masked)
    factor = log_rho.masked_fill(masked, 0.0) if denominator == "old" else torch.zeros_like(log_rho)
    return Correction(factor.exp().masked_fill(masked, 0.0), masked=masked)


def _outside(log_rho: Tensor, low: float | None, high: float) -> Tensor:
    return (log_rho < (-math.inf if low is None else math.log(low))) | (log_rho > math.log(high))


def sequence_masked(tokens: Tokens, mask: SequenceMask) -> Correction:
    """DeepSeek-V3.2's off-policy sequence mask: 0 where A < 0 and the mean of log(mu/pi_theta) exceeds delta."""
    drift = tokens.sequence_mean(tokens.rollout_logprobs - tokens.logprobs.detach())[tokens.sequence_ids]
    masked = (tokens.advantages < 0) & (drift > mask.delta)
    return Correction((~masked).to(drift), masked=masked)


def counted_lengths(tokens: Tokens, correction: Correction, config: ObjectiveConfig) -> Tensor:
    """[S] int64, |y_i| as the aggregation counts it: without what leaves the denominators."""
    if correction.masked is None or not leaves_denominators(config):
        return tokens.lengths
    return tokens.sequence_sum((~correction.masked).to(tokens.lengths))


def kept_lengths(inputs: LossInputs, config: ObjectiveConfig) -> Tensor:
    """[S] int64, the masked-in tokens of each sequence that are in the denominators. A mini-batch's Denominators are
    the sum of these and the number of those above 0."""
    tokens = Tokens.of(inputs)
    return counted_lengths(tokens, correct(tokens, config), config)
