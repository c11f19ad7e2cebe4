"""What a router's scores say of its choice: the one place that knows how they come from its logits.

A Tap sees the scores that its router chooses by, [R, experts]: logits, or, if the softmax comes first, probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.routing.replay import Tap


def router_logits(tap: Tap, scores: Tensor) -> Tensor:
    """Returns [R, experts] in the dtype of `scores`: numbers whose softmax is the router's probabilities."""
    return scores.log() if tap.pre_softmax else scores


def router_logprobs(tap: Tap, scores: Tensor) -> Tensor:
    """Returns the log-probs [R, experts], fp32, of all experts."""
    scores = scores.float()
    # A probability that underflowed is as good as the smallest: the difference of two logs of 0 would be NaN.
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log() if tap.pre_softmax else scores.log_softmax(-1)
