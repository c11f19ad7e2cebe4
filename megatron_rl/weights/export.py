"""The policy's weights as a stream of whole Hugging Face tensors on rank 0.

Each shard goes straight from the rank that holds it to rank 0, in one message per rank and bucket. Who holds
what follows from the architecture and the layout alone, so that nothing but weights is sent. Data- and
context-parallel duplicates send nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks, bind
from megatron_rl.models.family import FAMILIES
from megatron_rl.models.weight import Weight

DESTINATION = 0


@dataclass(frozen=True)
class ExportGroups:
    """This rank's process groups; torch's default group is the trainer's world."""

    tp: dist.ProcessGroup
    etp: dist.ProcessGroup  # tensor parallelism inside each expert
    ep: dist.ProcessGroup
    pp: dist.ProcessGroup


@dataclass(frozen=True)
class Grid:
    """Sizes of a layout, and where Megatron-Core's default rank order puts whom."""

    world: int
    tp: int
    etp: int
    ep: int
    pp: int
    vpp: int

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage; tp is fastest among them, and for experts etp, then ep."""
        return self.world // self.pp

    def stage(self, rank: int) -> int:
        return rank // self.stage_size

    def ranks(self, rank: int) -> ModelRanks:
        in_stage = rank % self.stage_size
        return ModelRanks(
            tp_rank=in_stage % self.tp,
            tp_size=self.tp,
            ep_rank=in_stage // self.etp % self.ep,
            ep_size=self.ep,
            etp_rank=in_stage % self.etp,
            etp_size=self.etp,
        )

    def holders(self, weight: Weight, arch: Architecture) -> range:
        """The ranks of the first replica that hold the weight's shards, in shard order."""
        if isinstance(weight.at, int):
            per_chunk = arch.num_layers // (self.pp * self.vpp)
            stage = weight.at // per_chunk % self.pp
        else:
            stage = 0 if weight.at == "first" else self.pp - 1
        first, size = stage * self.stage_size, self.tp
        if weight.expert is not None:
            first += self.etp * (weight.expert // (arch.num_experts // self.ep))
            size = self.etp
        return range(first, first + (size if weight.layout.split else 1))


def export_stream(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    groups: ExportGroups,
    bucket_bytes: int,
    tensor_of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[list[tuple[str, Tensor]]]:
    """Buckets of (Hugging Face name, whole tensor) on rank 0, empty lists elsewhere. Collective.

    `chunks` are the rank's virtual stages, unwrapped; `tensor_of` gives what is exported for a parameter:
    itself, or its gradient, of the parameter's shape and of one dtype throughout. Names come in the order
    of the family's list under every layout. Rank 0 holds at most two buckets' bytes, other ranks one; a
    bucket is larger than `bucket_bytes` only when a single weight is. Every rank must exhaust the stream.

    Raises RuntimeError when ranks or stages are not placed as the layout says, or when ranks disagree on
    dtype or bucket size, and ValueError for what `bind` refuses.
    """
    grid = Grid(
        world=dist.get_world_size(),
        tp=groups.tp.size(),
        etp=groups.etp.size(),
        ep=groups.ep.size(),
        pp=groups.pp.size(),
        vpp=len(chunks),
    )
    rank = dist.get_rank()
    _check_place(rank, grid, groups)
    slots = {slot.weight.name: slot for slot in bind(chunks, arch, grid.ranks(rank))}
    weights = [weight for weight in FAMILIES[arch.family].weights(arch) if not weight.copy]
    for weight in weights:
        if rank in grid.holders(weight, arch) and weight.name not in slots:
            raise RuntimeError(f"rank {rank} should hold {weight.name}; expected Megatron-Core's even pipeline split")
    sample = tensor_of(next(iter(slots.values())).parameter)

    def local(weight: Weight) -> Tensor:
        parameter = slots[weight.name].parameter
        tensor = tensor_of(parameter)
        if tensor.dtype != sample.dtype or tensor.shape != parameter.shape:
            raise RuntimeError(
                f"{weight.name}: a {tensor.dtype} tensor of shape {tuple(tensor.shape)} was to be exported; "
                f"expected {sample.dtype} and {tuple(parameter.shape)}"
            )
        return slots[weight.name].of(tensor).detach()

    buckets = _buckets(weights, bucket_bytes // sample.dtype.itemsize)
    _check_agreement(bucket_bytes, sample)
    return (_gather([(w, grid.holders(w, arch)) for w in bucket], local, sample) for bucket in buckets)


def _buckets(weights: Sequence[Weight], max_elements: int) -> list[list[Weight]]:
    """Consecutive weights, as many as fit."""
    buckets: list[list[Weight]] = []
    filled = max_elements
    for weight in weights:
        if not buckets or filled + weight.elements() > max_elements:
            buckets.append([])
            filled = 0
        buckets[-1].append(weight)
        filled += weight.elements()
    return buckets


def _gather(
    bucket: Sequence[tuple[Weight, range]], local: Callable[[Weight], Tensor], like: Tensor
) -> list[tuple[str, Tensor]]:
    """One bucket of weights, each with its holders: whole tensors on rank 0, [] elsewhere."""
    rank = dist.get_rank()
    if rank != DESTINATION:
        mine = [local(weight).reshape(-1) for weight, holders in bucket if rank in holders]
        if mine:
            _transfer([dist.P2POp(dist.isend, torch.cat(mine), DESTINATION)])
        return []
    received = _receive(bucket, like)
    tensors: list[tuple[str, Tensor]] = []
    for weight, holders in bucket:
        shards = [local(weight) if holder == DESTINATION else next(received[holder]) for holder in holders]
        tensors += weight.assemble(shards)
    return tensors


def _receive(bucket: Sequence[tuple[Weight, range]], like: Tensor) -> dict[int, Iterator[Tensor]]:
    """What each other holder sends of the bucket, shard by shard in the bucket's order."""
    shapes: dict[int, list[tuple[int, ...]]] = {}
    for weight, holders in bucket:
        for number, holder in enumerate(holders):
            if holder != DESTINATION:
                shapes.setdefault(holder, []).append(weight.cut(number, len(holders))[0])
    counts = {holder: [math.prod(shape) for shape in shapes[holder]] for holder in shapes}
    flats = {holder: like.new_empty(sum(counts[holder])) for holder in shapes}
    _transfer([dist.P2POp(dist.irecv, flat, holder) for holder, flat in flats.items()])
    return {holder: map(Tensor.view, flat.split(counts[holder]), shapes[holder]) for holder, flat in flats.items()}


def _transfer(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _check_place(rank: int, grid: Grid, groups: ExportGroups) -> None:
    found = (groups.tp.rank(), groups.etp.rank(), groups.ep.rank(), groups.pp.rank())
    ranks = grid.ranks(rank)
    expected = (ranks.tp_rank, ranks.etp_rank, ranks.ep_rank, grid.stage(rank))
    if found != expected:
        raise RuntimeError(
            f"rank {rank} is number {found} of its (tp, etp, ep, pp) groups; "
            f"Megatron-Core's default rank order puts it at {expected}"
        )


def _check_agreement(bucket_bytes: int, sample: Tensor) -> None:
    """Also the world's first collective: NCCL needs all ranks in one before a few exchange messages."""
    mine = torch.tensor([bucket_bytes, sample.dtype.itemsize], dtype=torch.int64, device=sample.device)
    extremes = torch.cat([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if not torch.equal(extremes, torch.cat([mine, -mine])):
        raise RuntimeError(
            f"ranks disagree: {sample.dtype} in buckets of {bucket_bytes} bytes on rank {dist.get_rank()}, "
            "something else on another; give every rank the same"
        )
