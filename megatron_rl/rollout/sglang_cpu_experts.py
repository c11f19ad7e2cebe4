"""Computes a layer's experts with few calls, on a CPU.

SGLang's function calls seven PyTorch functions for each expert and copies what they return. With the few tokens of a
decoding step these calls cost as much as the arithmetic. Here only the two matrix products are done expert by expert,
and write into one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def forward(original: Callable[..., Tensor], layer: Any, hidden: Tensor, chosen: Any, config: Any) -> Tensor:
    """Replaces moe_forward_native for experts that are SwiGLU without biases; calls it in other cases.

    hidden [T, H]; `chosen` are weights [T, K], experts [T, K] and what is not needed here. Returns [T, H].
    """
    if not _is_plain(layer, config):
        return original(layer, hidden, chosen, config)
    weights, experts, _ = chosen
    tokens, per_token = experts.shape
    flat = experts.reshape(-1).long()
    counts = torch.bincount(flat, minlength=layer.num_experts).tolist()
    order = flat.argsort(stable=True)
    gate_up = _products(hidden.index_select(0, order // per_token), layer.w13_weight, counts)
    gate, up = gate_up.chunk(2, dim=-1)
    outputs = _products(silu(gate).mul_(up), layer.w2_weight, counts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    by_token = outputs.index_select(0, place).view(tokens, per_token, outputs.shape[-1]).to(weights.dtype)
    return torch.bmm(weights.unsqueeze(1), by_token).squeeze(1).to(hidden.dtype)


def _is_plain(layer: Any, config: Any) -> bool:
    biases = (getattr(layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias"))
    return (
        config.activation == "silu"
        and config.gemm1_alpha is None
        and not config.apply_router_weight_on_input
        and all(bias is None for bias in biases)
    )


def _products(inputs: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """inputs [T, I], of which each expert has `counts` in turn, times weights [E, O, I] -> [T, O]."""
    outputs = inputs.new_empty(len(inputs), weights.shape[1])
    for count, weight, some, place in zip(
        counts, weights.unbind(), inputs.split(counts), outputs.split(counts), strict=True
    ):
        if count:
            torch.mm(some, weight.t(), out=place)
    return outputs
