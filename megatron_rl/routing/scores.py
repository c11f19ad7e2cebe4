"""What a router's scores say of its choice: the one place that knows how they come from its logits.

A Tap sees the scores that its router chooses by, [R, experts]: logits; probabilities, if the softmax comes first; or
sigmoids, with the router's bias added. A sigmoid's probability is its share in the sum over all experts. So, as after
a softmax, the weights of the chosen experts are their probabilities, normalised over the set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.routing.drift import RouterScores
from megatron_rl.routing.replay import Tap


def router_scores(tap: Tap, scores: Tensor) -> RouterScores:
    """Returns the log-probs of all experts, and what the router ranks them by."""
    features, scores = tap.features, scores.float()
    ranked = scores.log() if features.scores == "softmax" and features.pre_softmax else scores
    return RouterScores(router_logprobs(tap, scores), _within_groups(tap, ranked) if features.groups > 1 else ranked)


def router_logprobs(tap: Tap, scores: Tensor) -> Tensor:
    """Returns the log-probs [R, experts], fp32, of all experts."""
    features, scores = tap.features, scores.float()
    if features.scores == "softmax" and not features.pre_softmax:
        return scores.log_softmax(-1)
    # A score that underflowed is as good as the smallest: the difference of two logs of 0 would be NaN.
    logs = (scores if tap.bias is None else scores - tap.bias).clamp(min=torch.finfo(scores.dtype).tiny).log()
    return logs.log_softmax(-1) if features.scores == "sigmoid" else logs


def _within_groups(tap: Tap, scores: Tensor) -> Tensor:
    """Returns the scores, -inf outside of each row's best groups: those with the highest sums of their
    K / groups_per_token best scores [2412.19437, section 2.1.2]."""
    features = tap.features
    grouped = scores.unflatten(1, (features.groups, -1))
    sums = grouped.topk(tap.top_k // features.groups_per_token, dim=-1).values.sum(-1)
    chosen = sums.topk(features.groups_per_token, dim=1).indices
    best = torch.zeros_like(sums, dtype=torch.bool).scatter(1, chosen, True)
    return grouped.masked_fill(~best[:, :, None], float("-inf")).flatten(1)
