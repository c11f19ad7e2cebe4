"""Gradient norms by kind of weight, before clipping, from the distributed optimizer's shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared

KINDS = ("router", "expert", "attention", "embedding", "other")


def kind_of(parameter_name: str, value_head: bool = False) -> str:
    """Returns one of KINDS, or value_head for a critic's head."""
    if ".router." in parameter_name:
        return "router"
    if ".experts." in parameter_name:
        return "expert"
    # Transformer Engine keeps the norm before a linear layer in that layer's module; without it the norm is a module.
    if ".self_attention." in parameter_name and not parameter_name.endswith(".layer_norm_weight"):
        return "attention"
    if value_head and "output_layer" in parameter_name:
        return "value_head"
    if "word_embeddings" in parameter_name or "output_layer" in parameter_name:
        return "embedding"
    return "other"


def grad_norms(
    stages: Sequence[torch.nn.Module],
    optimizers: Sequence[MegatronOptimizer],
    device: torch.device,
    value_head: bool = False,
) -> dict[str, float]:
    """Global norms; the squares sum to the square of the optimizer's own norm. Collective, after prepare_grads()."""
    kinds = (*KINDS, "value_head") if value_head else KINDS
    squares = torch.zeros(len(kinds), dtype=torch.float64, device=device)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            # The same filter as Megatron-Core's: tied and tensor-parallel copies count once.
            if not param_is_not_shared(parameter):
                continue
            for optimizer in optimizers:
                if optimizer.is_stub_optimizer or parameter not in optimizer.model_param_group_index_map:
                    continue
                group, order = optimizer.model_param_group_index_map[parameter]
                shard = optimizer.optimizer.param_groups[group]["params"][order]
                if shard.grad is not None and tensor_parallel.param_is_not_tensor_parallel_duplicate(shard):
                    squares[kinds.index(kind_of(name, value_head))] += shard.grad.double().square().sum()
    dist.all_reduce(squares)
    return dict(zip(kinds, squares.sqrt().tolist(), strict=True))
