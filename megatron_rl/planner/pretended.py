"""Builds any rank of any layout as this process, without memory and without other ranks, to count its bytes.

Tensors are on torch's `meta` device: they have a shape and no values. Process groups are of torch's `fake` backend,
whose collectives do nothing. Model, DDP buffers and distributed optimizer are Megatron-Core's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.engine.device import use_device
from megatron_rl.engine.network import Network
from megatron_rl.engine.optimizer import optimizer_parts
from megatron_rl.planner.shares import FP32, NetworkBytes, state_bytes
from megatron_rl.ranks.place import Place, start_megatron, stop_process_groups

META = torch.device("meta")


@contextlib.contextmanager
def pretended_rank(layout: Layout, rank: int) -> Iterator[Place]:
    """Makes this process rank `rank` of the layout's world, in which no other rank exists. It never touches a GPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    use_device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    try:
        at = start_megatron(layout, seed=0, gloo=False)
        world = dist.group.WORLD
        assert world is not None
        with META:
            yield Place(**asdict(at), rank=rank, control=world, replica=world)
    finally:
        torch.cuda.current_device = current
        stop_process_groups()


def build(
    model_dir: Path,
    layout: Layout,
    place: Place,
    engine: EngineConfig,
    optim: OptimConfig | None,
    *,
    value_head: bool = False,
) -> Network:
    """Builds a network on the pretended rank at `place`; without `optim` nothing trains.

    The layers are those in plain PyTorch, as Transformer Engine's have weights of the same shapes; what only the latter
    do, and what else says nothing of sizes, has its default. So has the optimizer, which is counted by its elements.
    """
    plain = EngineConfig(device="cpu", layers="torch")
    kept = {key: getattr(engine, key) for key in ("dtype", "grad_dtype", "overlap")}
    engine = plain.model_copy(update=kept)
    optim = optim and optim.model_copy(update={"moments_dtype": "fp32", "offload": 0.0})
    return Network(model_dir, layout, place, engine, META, optim, frozen=optim is None, value_head=value_head)


def count_network(network: Network, optim: OptimConfig | None) -> NetworkBytes:
    """Counts a network's tensors: weights, DDP buffers, and what the optimizer holds after a step."""
    parameters = [p for model in network.models for p in model.parameters()]
    buffers = [b for model in network.models for b in model.buffers()]
    weights = sum(tensor.nbytes for tensor in (*parameters, *buffers))
    if optim is None:
        return NetworkBytes(weights)
    trained = [p for p in parameters if p.requires_grad]
    reduced = [b for stage in network.stages for b in (*stage.buffers, *stage.expert_parallel_buffers)]
    # DDP moves weights into its buffers, which it fills up to a multiple of the ranks.
    weights += sum(b.param_data.nbytes for b in reduced) - sum(p.nbytes for p in trained)
    parts = [part.optimizer for part in optimizer_parts(network.optimizer) if not part.is_stub_optimizer]
    stepped = sum(p.numel() for part in parts for group in part.param_groups for p in group["params"])
    on_gpu, on_host = state_bytes(2 if network.engine.dtype == "bf16" else FP32, optim)
    return NetworkBytes(
        weights=weights,
        gradients=sum(b.grad_data.nbytes for b in reduced),
        optimizer=round(stepped * on_gpu),
        host=round(stepped * on_host),
        largest=max((p.nbytes for p in trained), default=0),
    )
