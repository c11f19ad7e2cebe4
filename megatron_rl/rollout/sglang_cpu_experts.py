"""Computes a layer's experts with few calls, on a CPU.

SGLang's function calls seven PyTorch functions for each expert and copies what they return. With the few tokens of a
decoding step these calls cost as much as the arithmetic. Here two grouped matrix products compute all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, silu

ALIGNMENT = 16
"""Bytes; a row of a weight is a multiple of them, or a grouped product refuses it."""


def forward(original: Callable[..., Tensor], layer: Any, hidden: Tensor, chosen: Any, config: Any) -> Tensor:
    """Replaces moe_forward_native for experts that are SwiGLU without biases; calls it in other cases.

    hidden [T, H]; `chosen` are weights [T, K], experts [T, K] and what is not needed here. Returns [T, H].
    """
    weights, experts, _ = chosen
    if not len(hidden) or not _is_plain(layer, config):
        return original(layer, hidden, chosen, config)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=layer.num_experts).cumsum(0).int()
    gate_up = grouped_mm(hidden.index_select(0, order // experts.shape[1]), layer.w13_weight.mT, offs=ends)
    gate, up = gate_up.chunk(2, dim=-1)
    outputs = grouped_mm(silu(gate).mul_(up), layer.w2_weight.mT, offs=ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    summed = embedding_bag(place.view_as(experts), outputs.to(weights.dtype), mode="sum", per_sample_weights=weights)
    return summed.to(hidden.dtype)


def _is_plain(layer: Any, config: Any) -> bool:
    biases = (getattr(layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias"))
    rows = (weight.shape[-1] * weight.element_size() for weight in (layer.w13_weight, layer.w2_weight))
    return (
        config.activation == "silu"
        and config.gemm1_alpha is None
        and not config.apply_router_weight_on_input
        and all(bias is None for bias in biases)
        and all(size % ALIGNMENT == 0 for size in rows)
    )
