"""Process groups of a layout, and where this rank stands in it."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from megatron_rl.config.layout import Coordinates, Layout
from megatron_rl.ranks.gloo import one_gloo_device
from megatron_rl.ranks.megatron import model_parallel_cuda_manual_seed, parallel_state
from megatron_rl.ranks.world import read_world

# In these groups ranks wait for leaders, which wait for servers and verifiers with deadlines of their own. A rank that
# died is still noticed at once, because its connections close.
CONTROL_TIMEOUT = datetime.timedelta(days=2)
_made: list[dist.ProcessGroup] = []
"""Groups of start_process_groups, without the default one."""


@dataclass(frozen=True)
class Place(Coordinates):
    """This rank's coordinates and gloo groups.

    A replica is the tp * cp * pp ranks that hold one copy of the dense weights.
    """

    rank: int
    control: dist.ProcessGroup  # all ranks; for lengths, samples and metrics
    replica: dist.ProcessGroup  # this rank's replica, its leader first

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this rank reports for its stage. Tensor- and context-parallel ranks hold the same samples."""
        return self.tp == self.cp == 0


def backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def start_process_groups(layout: Layout, device: torch.device, seed: int, timeout_seconds: float = 1800.0) -> Place:
    """Joins torchrun's world, or makes a world of this rank alone; then makes Megatron-Core's groups. Collective.

    Raises RuntimeError if the size of the world or Megatron-Core's order of ranks differs from the layout.
    """
    with one_gloo_device():
        _join_world(device, datetime.timedelta(seconds=timeout_seconds))
        if dist.get_world_size() != layout.world_size:
            raise RuntimeError(f"the layout needs {layout.world_size} ranks, but {dist.get_world_size()} were started")
        before = set(_world.pg_map)
        at = start_megatron(layout, seed)
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        replicas = [
            dist.new_group(layout.replica_ranks(dp), backend="gloo", timeout=CONTROL_TIMEOUT) for dp in range(layout.dp)
        ]
        _made.extend(group for group in _world.pg_map if group not in before)
    return Place(**asdict(at), rank=dist.get_rank(), control=control, replica=replicas[at.dp])


def start_megatron(layout: Layout, seed: int, *, gloo: bool = True) -> Coordinates:
    """Makes Megatron-Core's groups in the world that there is, without those of gloo beside NCCL's if not `gloo`.
    Collective.

    Raises RuntimeError if Megatron-Core's order of ranks differs from the layout.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=gloo,
    )
    model_parallel_cuda_manual_seed(seed)
    return _check_order(layout)


def _join_world(device: torch.device, timeout: datetime.timedelta) -> None:
    if not dist.is_initialized() and read_world().size > 1:
        dist.init_process_group(backend(device), timeout=timeout)
    elif not dist.is_initialized():  # alone, whatever started it
        dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _check_order(layout: Layout) -> Coordinates:
    """This rank's coordinates in Megatron-Core's groups. Raises RuntimeError if the layout says otherwise."""
    found = Coordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )
    expected = layout.coordinates(dist.get_rank())
    if found != expected:
        raise RuntimeError(f"rank {dist.get_rank()}: Megatron-Core puts it at {found}, expected {expected}")
    return found


def stop_process_groups(*, leave_world: bool = True) -> None:
    """Undoes start_process_groups. With `leave_world` False the default group stays, for a caller that made it.

    Megatron-Core only forgets most of its groups. Each would keep its threads, so that after thirty runs of a study a
    run would take twice as long.
    """
    parallel_state.destroy_model_parallel()
    made = list(_made)
    _made.clear()
    if leave_world and dist.is_initialized():
        dist.destroy_process_group()
    elif not leave_world:
        for group in made:
            if group in _world.pg_map:
                dist.destroy_process_group(group)
