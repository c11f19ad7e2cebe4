"""Gradient norms by kind of weight, before clipping, from the distributed optimizer's shards."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared

from megatron_rl.engine.optimizer_state import gradient_of, shard_of
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import Slot
from megatron_rl.models.kinds import WeightKind
from megatron_rl.models.registry import kinds_of


def norm_groups(slots: Iterable[Slot]) -> dict[torch.nn.Parameter, tuple[str, ...]]:
    """Returns the norms in which each parameter counts: its kind's, and a router's layer's."""
    groups: dict[torch.nn.Parameter, tuple[str, ...]] = {}
    for slot in slots:
        if not isinstance(slot.parameter, torch.nn.Parameter):
            continue
        kind = slot.weight.kind
        layer = (_of_layer(slot.weight.at),) if kind == "router" and isinstance(slot.weight.at, int) else ()
        groups[slot.parameter] = (kind, *layer)
    return groups


def reported_norms(arch: Architecture, frozen: Collection[WeightKind]) -> tuple[str, ...]:
    """Returns the names of the norms, the same on every rank: `router`, ..., and `router/layer_03`."""
    kinds = [kind for kind in kinds_of(arch) if kind not in frozen]
    layers = arch.moe_layers if "router" in kinds else ()
    return (*kinds, *map(_of_layer, layers))


def total_norm(norms: Mapping[str, float]) -> float:
    """Returns the norm of the whole gradient from the norms of all kinds."""
    return math.hypot(*(norm for name, norm in norms.items() if "/" not in name))


def _of_layer(layer: int) -> str:
    return f"router/layer_{layer:02d}"


def grad_norms(
    groups: Mapping[torch.nn.Parameter, Sequence[str]],
    reported: Sequence[str],
    optimizers: Sequence[MegatronOptimizer],
    device: torch.device,
) -> dict[str, float]:
    """Returns the global norms that are `reported`. Collective, after prepare_grads().

    `groups` are those of this rank's parameters. `reported` has every kind that trains: the squares of the kinds then
    sum to the square of the optimizer's own norm.
    """
    squares = torch.zeros(len(reported), dtype=torch.float64, device=device)
    for parameter, names in groups.items():
        # The same filter as Megatron-Core's: tied and tensor-parallel copies count once.
        if not param_is_not_shared(parameter):
            continue
        for optimizer in optimizers:
            if optimizer.is_stub_optimizer or parameter not in optimizer.model_param_group_index_map:
                continue
            shard = shard_of(optimizer, parameter)
            gradient = gradient_of(optimizer, shard)
            if gradient is not None and tensor_parallel.param_is_not_tensor_parallel_duplicate(shard):
                squares[[reported.index(name) for name in names]] += gradient.double().square().sum()
    dist.all_reduce(squares)
    return dict(zip(reported, squares.sqrt().tolist(), strict=True))
