"""Moves what a network holds on a GPU into the host's memory and back, by Megatron-Core's own calls.

On a CPU weights and the optimizer stay where they are: they are in the host's memory already. Gradient buffers are
freed there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_rl.engine.network import Network

Kind = Literal["weights", "gradients", "optimizer"]


def offload(network: Network, kind: Kind) -> None:
    """Frees the GPU's memory of this kind: of the optimizer first, and of weights afterwards, which it may step where
    they are. Nothing may read it until `restore`; gradients are lost.

    A checkpoint may be taken meanwhile, of fp32 weights and moments in the host's memory.
    """
    on_gpu = network.device.type == "cuda"
    if kind == "gradients":
        for stage in _trained(network):
            stage.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)
    elif kind == "optimizer" and on_gpu:
        network.optimizer.offload_to_cpu()
    elif kind == "weights" and on_gpu:
        for buffer in _buffers(network):
            buffer.offload_to_cpu(move_grads=False)
        for parameter in _outside_of_buffers(network):
            parameter.data = parameter.data.cpu()
        torch.cuda.empty_cache()


def restore(network: Network, kind: Kind) -> None:
    """Undoes `offload`: of weights first, and of the optimizer afterwards. Gradients are then 0."""
    on_gpu = network.device.type == "cuda"
    if kind == "gradients":
        for stage in _trained(network):
            stage.restore_grad_buffers(synchronize=on_gpu)
    elif kind == "optimizer" and on_gpu:
        network.optimizer.restore_from_cpu()
    elif kind == "weights" and on_gpu:
        for buffer in _buffers(network):
            buffer.reload_from_cpu(move_grads=False)
        for parameter in _outside_of_buffers(network):
            parameter.data = parameter.data.cuda()


def _trained(network: Network) -> list[DistributedDataParallel]:
    return [stage for stage in network.stages if isinstance(stage, DistributedDataParallel)]


def _buffers(network: Network) -> list[Any]:
    return [buffer for stage in _trained(network) for buffer in (*stage.buffers, *stage.expert_parallel_buffers)]


def _outside_of_buffers(network: Network) -> Iterator[torch.nn.Parameter]:
    """Yields the parameters that do not train."""
    inside = {parameter for buffer in _buffers(network) for parameter in buffer.params}
    for model in network.models:
        yield from (parameter for parameter in model.parameters() if parameter not in inside)
