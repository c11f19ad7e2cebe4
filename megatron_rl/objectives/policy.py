"""The loss of one packed micro-batch, from the switches of an objective. No distributed code."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.config.schema import ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.inputs import LossInputs, LossOutputs, LossValues, PolicyLossOutputs
from megatron_rl.objectives.losses import clipped_surrogate, token_weights
from megatron_rl.objectives.ratios import RATIOS, Tokens, token_log_ratio


def policy_loss(inputs: LossInputs, config: ObjectiveConfig, denominators: Denominators) -> PolicyLossOutputs:
    """-J over the micro-batch, divided by the mini-batch's denominators.

    GRPO, DAPO and GSPO differ only in `config`. The gradient flows through inputs.logprobs alone: through
    every token's own ratio (token, sequence-token), or through all tokens of the sequence (sequence); none
    where a clip is active. Micro-batches without a masked-in token give 0 with a gradient of 0. Raises
    ValueError for constant-length without its constant.
    """
    tokens = Tokens.of(inputs)
    log_ratio = token_log_ratio(tokens, config.denominator)
    log_weight = RATIOS[config.ratio](log_ratio, tokens)
    surrogate, clipping = clipped_surrogate(log_weight, tokens.advantages, config.clip)
    loss = -(token_weights(tokens, config, denominators) * surrogate).sum()
    return PolicyLossOutputs(loss, LossValues(tokens.sequence_mean(log_ratio.detach()), clipping))


def sft_loss(logprobs: Tensor, loss_mask: Tensor, denominators: Denominators) -> LossOutputs:
    """Mean negative log-likelihood of the masked-in tokens; logprobs [T] float, loss_mask [T] bool."""
    return LossOutputs(-logprobs[loss_mask].sum() / max(denominators.tokens, 1))
