"""Corrections for the mismatch between trainer and rollout engine. Shapes as in megatron_rl.objectives.inputs.

All but `mis` leave the denominators as they are: a dropped term counts as 0. What `mis` rejects leaves them too, as if
it had been masked out; its caller takes them from `kept_lengths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.config.schema import CorrectionConfig, ObjectiveConfig
from megatron_rl.objectives.inputs import Correction, LossInputs
from megatron_rl.objectives.ratios import Tokens

LEAVES_DENOMINATORS = {"none": False, "tis": False, "mis": True, "icepop": False, "sequence-mask": False}
"""By CorrectionConfig.kind: whether what it drops leaves |y_i| of the aggregation and the mini-batch's denominators."""


def correct(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    """Raises ValueError for sequence-mask without its delta."""
    return CORRECTIONS[config.correction.kind](tokens, config)


def log_mismatch(tokens: Tokens, config: ObjectiveConfig) -> Tensor:
    """[M] log rho, or log omega where the ratio is against mu, at the level of the correction; detached."""
    policy = tokens.old_logprobs if config.denominator == "old" else tokens.logprobs.detach()
    log_rho = policy - tokens.rollout_logprobs
    match config.correction.level:
        case "token":
            return log_rho
        case "sequence":
            return tokens.sequence_sum(log_rho)[tokens.sequence_ids]
        case "geometric":
            return tokens.sequence_mean(log_rho)[tokens.sequence_ids]


def uncorrected(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    return Correction(torch.ones_like(tokens.old_logprobs))


def truncated(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    """TIS: rho -> min(rho, high)."""
    log_rho = log_mismatch(tokens, config)
    _, high = _log_band(config.correction)
    bounded = log_rho.clamp(max=high)
    # omega is in the ratio already: it only has to be brought down, not applied a second time.
    factor = bounded if config.denominator == "old" else bounded - log_rho
    return Correction(factor.exp(), truncated=log_rho > high)


def banded(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    """MIS, and IcePop [2510.18855, equation 3]: rho where low <= rho <= high, else 0."""
    log_rho = log_mismatch(tokens, config)
    low, high = _log_band(config.correction)
    masked = (log_rho < low) | (log_rho > high)
    factor = log_rho.masked_fill(masked, 0.0) if config.denominator == "old" else torch.zeros_like(log_rho)
    return Correction(factor.exp().masked_fill(masked, 0.0), masked=masked)


def sequence_masked(tokens: Tokens, config: ObjectiveConfig) -> Correction:
    """DeepSeek-V3.2's off-policy sequence mask: 0 where A < 0 and the mean of log(mu/pi_theta) exceeds delta."""
    if config.correction.delta is None:
        raise ValueError("objective.correction.delta: not set, needed by correction.kind: sequence-mask")
    drift = tokens.sequence_mean(tokens.rollout_logprobs - tokens.logprobs.detach())[tokens.sequence_ids]
    masked = (tokens.advantages < 0) & (drift > config.correction.delta)
    return Correction((~masked).to(drift), masked=masked)


CORRECTIONS: dict[str, Callable[[Tokens, ObjectiveConfig], Correction]] = {
    "none": uncorrected,
    "tis": truncated,
    "mis": banded,
    "icepop": banded,
    "sequence-mask": sequence_masked,
}


def counted_lengths(tokens: Tokens, correction: Correction, config: ObjectiveConfig) -> Tensor:
    """[S] int64, |y_i| as the aggregation counts it: without what leaves the denominators."""
    if correction.masked is None or not LEAVES_DENOMINATORS[config.correction.kind]:
        return tokens.lengths
    return tokens.sequence_sum((~correction.masked).to(tokens.lengths))


def kept_lengths(inputs: LossInputs, config: ObjectiveConfig) -> Tensor:
    """[S] int64, the masked-in tokens of each sequence that are in the denominators. A mini-batch's Denominators are
    the sum of these and the number of those above 0."""
    tokens = Tokens.of(inputs)
    return counted_lengths(tokens, correct(tokens, config), config)


def _log_band(config: CorrectionConfig) -> tuple[float, float]:
    low = -math.inf if config.low is None else math.log(config.low)
    return low, math.inf if config.high is None else math.log(config.high)
