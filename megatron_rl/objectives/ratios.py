"""Importance ratios, the first two switches of an objective. Shapes as in megatron_rl.objectives.inputs.

Everything works on the M masked-in tokens alone, so no formula carries a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.objectives.inputs import LossInputs


@dataclass(frozen=True, eq=False)
class Tokens:
    """The masked-in tokens of a micro-batch, [M] each, in packed order, and the lengths of its sequences."""

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    """[S] int64, |y|: masked-in tokens; 0 for a sequence that is masked out."""
    reference_logprobs: Tensor | None = None
    router_shift: Tensor | None = None
    top_logprobs: Tensor | None = None
    """[M, k]"""
    top_rollout_logprobs: Tensor | None = None
    """[M, k]"""
    prompts: Sequence[int] | None = None
    """[S] number of each sequence's prompt."""

    @classmethod
    def of(cls, inputs: LossInputs) -> Tokens:
        # One nonzero(), so that a GPU waits for the host once and not once per tensor.
        kept = inputs.loss_mask.nonzero().squeeze(1)
        sequence_ids = inputs.sequence_ids[kept]
        return cls(
            logprobs=inputs.logprobs[kept],
            old_logprobs=inputs.old_logprobs[kept].detach(),
            rollout_logprobs=inputs.rollout_logprobs[kept].detach(),
            advantages=inputs.advantages[kept].detach(),
            sequence_ids=sequence_ids,
            lengths=sequence_ids.new_zeros(inputs.num_sequences).index_add_(
                0, sequence_ids, torch.ones_like(sequence_ids)
            ),
            reference_logprobs=None if inputs.reference_logprobs is None else inputs.reference_logprobs[kept].detach(),
            router_shift=None if inputs.router_shift is None else inputs.router_shift[kept].detach(),
            top_logprobs=None if inputs.top_logprobs is None else inputs.top_logprobs[kept],
            top_rollout_logprobs=(
                None if inputs.top_rollout_logprobs is None else inputs.top_rollout_logprobs[kept].detach()
            ),
            prompts=inputs.prompts,
        )

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[S] sum of values [M] over each sequence. Differentiable in values."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.sequence_ids, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[S] mean of values [M] over each sequence; 0 for one without tokens. Differentiable in values."""
        return self.sequence_sum(values) / self.lengths.clamp(min=1)


def token_log_ratio(tokens: Tokens, denominator: str) -> Tensor:
    """[M] log pi_theta - log pi_old (`old`: log r) or log pi_theta - log mu (`rollout`: log omega)."""
    return tokens.logprobs - {"old": tokens.old_logprobs, "rollout": tokens.rollout_logprobs}[denominator]


def shifted(log_ratio: Tensor, tokens: Tokens, floor: float | None) -> Tensor:
    """[M] log of each token's ratio times its router shift, which counts as no less than `floor`: RSPO [2510.23027].
    Without a floor the objective has no router shift.

    So every ratio of RATIOS is that of the tokens' products: s times the geometric mean of a response's shifts, the
    product over it times theirs. The shift carries no gradient.
    """
    if floor is None or tokens.router_shift is None:
        return log_ratio
    return log_ratio + tokens.router_shift.clamp(min=floor).log()


def floored(tokens: Tokens, floor: float | None) -> Tensor | None:
    """[M] bool, where the router shift counts as `floor`; None where there is none."""
    return None if floor is None or tokens.router_shift is None else tokens.router_shift < floor


def token(log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """log r_t: PPO [1707.06347, equation 6], GRPO [2402.03300]."""
    return log_ratio


def sequence(log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """log s_i = (1/|y_i|) sum_t log r_{i,t} at each token of i: GSPO [2507.18071, equation 7]."""
    return tokens.sequence_mean(log_ratio)[tokens.sequence_ids]


def sequence_token(log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """log of sg[s_i] pi_theta / sg[pi_theta]: GSPO-token [2507.18071, equation 14].

    The value is that of `sequence` to the last bit; the gradient of each token is its own.
    """
    return sequence(log_ratio, tokens).detach() + (log_ratio - log_ratio.detach())


def sequence_product(log_ratio: Tensor, tokens: Tokens) -> Tensor:
    """log of pi_theta(y_i)/mu(y_i), sum_t log r_{i,t}, at each token of i: TOPR [2503.14286]."""
    return tokens.sequence_sum(log_ratio)[tokens.sequence_ids]


RATIOS: dict[str, Callable[[Tensor, Tokens], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence-token": sequence_token,
    "sequence-product": sequence_product,
    "geometric": token,  # clipped by token; the mean comes after (losses.geometric_surrogate)
}
"""By ObjectiveConfig.ratio: log_ratio [M] -> log of the ratio that is clipped, [M]."""
