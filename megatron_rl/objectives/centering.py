"""Score centering [2609.20807]: takes off each token's term the mean of that term over mu. No distributed code.

The mean is over mu's most likely tokens, the head H, and over a tail that is modelled. Shapes as in
megatron_rl.objectives.inputs; k tokens of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.objectives.corrections import correct
from megatron_rl.objectives.inputs import CenteringValues
from megatron_rl.objectives.losses import log_band
from megatron_rl.objectives.ratios import Tokens

LEAST_LOGPROB = -60.0
"""log mu of a token that is counted with the tail, as one that is missing is: in fp32 its ratio might overflow."""

LEAST_TAIL = 1e-5
"""Probability below which a tail is rounding: a sum of fp32 probabilities is off by about a tenth of it."""


def centering(tokens: Tokens, config: ObjectiveConfig) -> tuple[Tensor, CenteringValues]:
    """Returns sum_v sg(q_v w_v) log p_v at each token, [M], and what it is made of; q = mu, p = pi_theta, w = f(p/q).

    f is what the objective makes of the sampled token's ratio: its clip times its correction. Over the vocabulary
    outside the head q is taken to be alpha p, alpha = (1 - Q_H)/(1 - P_H). Because sum_v p_v grad log p_v is 0, the
    tail is a term of the head:

        sum over H of sg[q_v f(p_v/q_v) - alpha f(1/alpha) p_v] log p_v.

    A head without a tail, as one of the whole vocabulary, has no second part: the sum is exact.

    Differentiable in the head's log-probs alone. Raises ValueError without a head.
    """
    if tokens.top_logprobs is None or tokens.top_rollout_logprobs is None:
        raise ValueError("objective.centering: needs mu's most likely tokens and their log-probs under both policies")
    present = tokens.top_rollout_logprobs > LEAST_LOGPROB
    live = tokens.top_logprobs.masked_fill(~present, 0.0)
    # What is left to 1 may be small: sum in double.
    log_q, log_p = tokens.top_rollout_logprobs.masked_fill(~present, 0.0).double(), live.detach().double()
    q, p = log_q.exp() * present, log_p.exp() * present
    tail_q, tail_p = 1 - q.sum(-1), 1 - p.sum(-1)
    alpha = tail_q.clamp(min=LEAST_TAIL) / tail_p.clamp(min=LEAST_TAIL)
    advantages = tokens.advantages[:, None]
    on_head = q * weights(log_p - log_q, advantages, config)
    on_tail = alpha * weights(-alpha.log()[:, None], advantages, config)[:, 0]
    on_tail = on_tail.masked_fill((tail_q <= LEAST_TAIL) & (tail_p <= LEAST_TAIL), 0.0)
    term = ((on_head - on_tail[:, None] * p).to(live) * live).sum(-1)
    return term, _values(tokens, config, on_head, on_tail, p, alpha, tail_q, tail_p)


def weights(log_ratio: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Tensor:
    """f(r) of log r [M, n] for tokens with these advantages [M, 1]: what a sampled token with this ratio weighs."""
    flat = log_ratio.reshape(-1)
    nothing = torch.zeros_like(flat)
    # As if each had been sampled, with mu's log-prob 0: then the same code weighs it as weighs the sampled token.
    as_sampled = Tokens(
        logprobs=flat,
        old_logprobs=nothing,
        rollout_logprobs=nothing,
        advantages=advantages.expand_as(log_ratio).reshape(-1),
        sequence_ids=torch.zeros_like(flat, dtype=torch.int64),
        lengths=torch.full((1,), len(flat), device=flat.device),
    )
    correction = correct(as_sampled, config)
    low, high = log_band(config.clip)
    # A ratio that is masked may overflow, and 0 * inf is NaN.
    bounded = flat if correction.masked is None else flat.masked_fill(correction.masked, 0.0)
    return (bounded.clamp(low, high).exp() * correction.factor).view_as(log_ratio)


def _values(
    tokens: Tokens,
    config: ObjectiveConfig,
    on_head: Tensor,
    on_tail: Tensor,
    p: Tensor,
    alpha: Tensor,
    tail_q: Tensor,
    tail_p: Tensor,
) -> CenteringValues:
    """Half the L1 norms of the gradients in the logits: of log p_a it is 1 - p_a, of the mean sum_v m_v log p_v half
    of sum_v |m_v - p_v sum_u m_u|."""
    rest = tail_p.clamp(min=0)
    total = on_head.sum(-1) + on_tail * rest
    drift = ((on_head - p * total[:, None]).abs().sum(-1) + (on_tail - total).abs() * rest) / 2
    log_ratio = (tokens.logprobs.detach() - tokens.rollout_logprobs)[:, None]
    sampled = weights(log_ratio, tokens.advantages[:, None], config)[:, 0]
    return CenteringValues(
        rollout_mass=1 - tail_q,
        policy_mass=1 - tail_p,
        alpha=alpha,
        drift=drift,
        score=sampled * (1 - tokens.logprobs.detach().exp()).clamp(min=0),
    )
