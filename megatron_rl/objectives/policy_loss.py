"""The loss of one packed micro-batch, from the switches of an objective. No distributed code."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.centering import centering
from megatron_rl.objectives.corrections import correct, counted_lengths, leaves_denominators
from megatron_rl.objectives.inputs import Correction, LossInputs, LossOutputs, LossValues, PolicyLossOutputs
from megatron_rl.objectives.kl import in_loss, kl_terms
from megatron_rl.objectives.losses import clipping, surrogate, token_weights
from megatron_rl.objectives.ratios import RATIOS, Tokens, floored, shifted, token_log_ratio


def policy_loss(inputs: LossInputs, config: ObjectiveConfig, denominators: Denominators) -> PolicyLossOutputs:
    """-J over the micro-batch, divided by the mini-batch's denominators.

    The members of the family differ only in `config`. The gradient flows through inputs.logprobs: through every token's
    own ratio or log-prob, or through all tokens of the sequence (sequence, geometric). Under score centering it flows
    through inputs.top_logprobs too. Micro-batches
    without a masked-in token give 0 with a gradient of 0. Raises ValueError for a switch without its parameter.
    """
    tokens = Tokens.of(inputs)
    correction = correct(tokens, config)
    log_ratio = token_log_ratio(tokens, config.denominator)
    log_weight = RATIOS[config.ratio](shifted(log_ratio, tokens, config.router_shift), tokens)
    if correction.masked is not None and config.ratio != "geometric":
        log_weight = log_weight.masked_fill(correction.masked, 0.0)  # 0 * exp(log w) is NaN where w overflows
    where = clipping(tokens, config)
    terms = correction.factor * surrogate(log_weight, tokens, where, config)
    centred = None
    if config.centering is not None:
        mean, centred = centering(tokens, config)
        terms = terms - tokens.advantages * mean
    weights = token_weights(tokens, counted_lengths(tokens, correction, config), config, denominators)
    if in_loss(config):
        terms = terms - kl_terms(tokens, config, _uncounted(correction, config))
    values = LossValues(
        tokens.sequence_mean(log_ratio.detach()), where, correction, floored(tokens, config.router_shift), centred
    )
    return PolicyLossOutputs(-(weights * terms).sum(), values)


def _uncounted(correction: Correction, config: ObjectiveConfig) -> Tensor | None:
    """The KL is of all tokens, whatever weight a correction gives them, but not of what left the denominators."""
    return correction.masked if leaves_denominators(config) else None


def sft_loss(logprobs: Tensor, loss_mask: Tensor, denominators: Denominators) -> LossOutputs:
    """Mean negative log-likelihood of the masked-in tokens; logprobs [T] float, loss_mask [T] bool."""
    return LossOutputs(-logprobs[loss_mask].sum() / max(denominators.tokens, 1))
