"""What one of Megatron-Core's distributed optimizers holds of a parameter on this rank, in each of its three forms.

- Plain: the optimizer steps fp32 copies of the weights, whose `.grad` Megatron-Core sets.
- Precision-aware (optim.moments_dtype): Transformer Engine's FusedAdam steps the bf16 weights. It keeps the 16 bits
  that these lack of fp32, and moments in bf16.
- Hybrid (optim.offload): Megatron-Core's HybridDeviceOptimizer has sub-optimizers, for the host and for the GPU. They
  step fp32 copies of their own.

In the last two forms the gradient is in `decoupled_grad`, because a gradient has the dtype of its tensor otherwise.
Megatron-Core's own functions for checkpoints do not fit here: they fail before the first step, and give no fp32 weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer import HybridDeviceOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_rl.engine.fragments import PARAM
from megatron_rl.engine.split_weights import join_weight, split_weight

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
"""What Adam calls the number of its steps."""
_REST = "master_param"
"""What FusedAdam calls the rest of a weight in fp32, and HybridDeviceOptimizer a copy that is read elsewhere here."""


def shard_of(part: MegatronOptimizer, parameter: torch.nn.Parameter) -> Tensor:
    """Returns the tensor that the optimizer steps for its stretch of a parameter."""
    group, order = part.model_param_group_index_map[parameter]
    shard: Tensor = part.optimizer.param_groups[group]["params"][order]
    return shard


def gradient_of(part: MegatronOptimizer, shard: Tensor) -> Tensor | None:
    """Returns the gradient that the optimizer will step with, after prepare_grads()."""
    if _steps_model_weights(part):
        return getattr(shard, "decoupled_grad", None)
    return shard.grad


def tensors_of(part: MegatronOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """Returns what the optimizer has of a parameter on this rank, by kind: `param` in fp32, and the moments once there
    are. A weight that must be put together is on the host, as a GPU may have no room for all of them."""
    shard = shard_of(part, parameter)
    state = part.optimizer.state.get(shard, {})
    return {PARAM: _weight(part, shard, state), **{kind: state[kind] for kind in MOMENTS if kind in state}}


@torch.no_grad()
def restore_tensors(part: MegatronOptimizer, parameter: torch.nn.Parameter, values: Mapping[str, Tensor]) -> None:
    """Sets what `tensors_of` returns, and the model's weight if the optimizer steps it."""
    shard = shard_of(part, parameter)
    state = part.optimizer.state.get(shard, {})
    for kind in MOMENTS:
        if kind in state:
            state[kind].copy_(values[kind])
    weight = values[PARAM]
    if _REST in state and state[_REST].dtype == torch.int16:
        rounded, rest = split_weight(weight)
        shard.copy_(rounded)
        state[_REST].copy_(rest)
        return
    shard.copy_(weight)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer.param_to_inner_param[shard].copy_(weight)


def steps_of(part: MegatronOptimizer) -> int:
    """Returns how often Adam has stepped: the same for every weight."""
    counts = [int(state[STEP]) for inner in _inner(part) for state in inner.state.values() if STEP in state]
    counts += [int(group[STEP]) for inner in _inner(part) for group in inner.param_groups if STEP in group]
    return max(counts, default=0)


def restore_steps(part: MegatronOptimizer, steps: int) -> None:
    """Sets the number of steps, and makes moments if there are to be some."""
    if steps and not part.optimizer.state:
        part._init_optimizer_states_with_dummy_values()
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                shard.grad = None  # which Megatron-Core leaves there if it is not what the optimizer reads
    for inner in _inner(part):
        for state in inner.state.values():
            if STEP in state:
                state[STEP].fill_(steps)
        for group in inner.param_groups:
            if STEP in group:
                group[STEP] = steps


def _weight(part: MegatronOptimizer, shard: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Returns the fp32 weight."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        inner: Tensor = part.optimizer.param_to_inner_param[shard]
        return inner
    if shard.dtype == torch.float32:
        return shard
    if _REST not in state:  # before the first step
        return shard.cpu().float()
    return join_weight(shard.cpu(), state[_REST].cpu())


def _steps_model_weights(part: MegatronOptimizer) -> bool:
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def _inner(part: MegatronOptimizer) -> list[Any]:
    """Returns torch's optimizers: those for the host and the GPU, or the one."""
    return list(getattr(part.optimizer, "sub_optimizers", [part.optimizer]))
