"""A router's tap without a router, and what routers say, from their logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_rl.models.architecture import Router
from megatron_rl.routing.drift import RouterScores
from megatron_rl.routing.replay import Tap


def make_tap(
    num_experts: int, *, layer: int = 0, column: int = 0, top_k: int = 2, bias: Tensor | None = None, **features: Any
) -> Tap:
    """Returns a tap of stage 0; `features` are those of Router."""
    router = Router(bias=bias is not None, **features)
    return Tap(0, layer, column, num_experts, top_k, router, bias)


def of_logits(logits: Tensor) -> RouterScores:
    """Returns what a softmax router with these logits [R, experts] says."""
    return RouterScores(logits.float().log_softmax(-1), logits.float())
