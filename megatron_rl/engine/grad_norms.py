"""Gradient norms by kind of weight, before clipping, from the distributed optimizer's shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared

from megatron_rl.models.kinds import WeightKind


def grad_norms(
    kinds: Mapping[torch.nn.Parameter, WeightKind],
    reported: Sequence[WeightKind],
    optimizers: Sequence[MegatronOptimizer],
    device: torch.device,
) -> dict[str, float]:
    """Returns the global norm of each `reported` kind. Collective, after prepare_grads().

    `kinds` are those of this rank's parameters. `reported` is the same on every rank, and has every kind that trains:
    the squares then sum to the square of the optimizer's own norm.
    """
    squares = torch.zeros(len(reported), dtype=torch.float64, device=device)
    for parameter, kind in kinds.items():
        # The same filter as Megatron-Core's: tied and tensor-parallel copies count once.
        if not param_is_not_shared(parameter):
            continue
        for optimizer in optimizers:
            if optimizer.is_stub_optimizer or parameter not in optimizer.model_param_group_index_map:
                continue
            group, order = optimizer.model_param_group_index_map[parameter]
            shard = optimizer.optimizer.param_groups[group]["params"][order]
            if shard.grad is not None and tensor_parallel.param_is_not_tensor_parallel_duplicate(shard):
                squares[reported.index(kind)] += shard.grad.double().square().sum()
    dist.all_reduce(squares)
    return dict(zip(reported, squares.sqrt().tolist(), strict=True))
