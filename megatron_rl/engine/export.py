"""The policy's weights as a stream of whole Hugging Face tensors on rank 0.

Each shard goes straight from the rank that holds it to rank 0, in a few messages per rank and bucket. Who holds
what follows from the architecture and the layout alone, so that nothing but weights is sent. Data- and
context-parallel duplicates send nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rl.config.layout import Layout
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks, Slot, WeightNames, bind
from megatron_rl.models.registry import weights_of
from megatron_rl.models.shards import assemble
from megatron_rl.models.weight import Weight

DESTINATION = 0
MESSAGES = 8
"""A bucket arrives in about so many messages from each rank, because the shards of one and the whole tensors that are
made of them are there at the same time."""
_Held = list[tuple[Weight, range]]
"""Weights, each with the ranks that hold its shards."""


def export_stream(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    layout: Layout,
    names: WeightNames,
    bucket_bytes: int,
    tensor_of: Callable[[nn.Parameter], Tensor] | None = None,
    reuse: bool = False,
) -> Iterator[list[tuple[str, Tensor]]]:
    """Buckets of (Hugging Face name, whole tensor) on rank 0, empty lists elsewhere. Collective.

    `chunks` are the rank's virtual stages, unwrapped, and `names` those of their layers; `tensor_of` gives what is
    exported for a parameter in its place, as its gradient, of the parameter's shape and of one dtype throughout;
    weights that do not train are then left out. Tensors come in the order of the model's list of weights under every
    layout, and those of a bucket follow each other in memory. With `reuse` a bucket stays as it is until the next but
    one is asked for, rank 0 holds at most 2 * bucket_bytes, and other ranks hold an eighth of `bucket_bytes`. A bucket
    or a message is larger only if a single weight is, or all experts that one tensor stacks. Every rank must exhaust
    the stream.

    Raises RuntimeError when stages are not cut as the layout says, or when ranks disagree on dtype or bucket size,
    and ValueError for what `bind` refuses.
    """
    rank = dist.get_rank()
    slots = {slot.weight.name: slot for slot in bind(chunks, arch, model_ranks(layout, rank), names)}
    weights = [weight for weight in weights_of(arch) if not weight.copy and (weight.trained or tensor_of is None)]
    for weight in weights:
        if rank in holders(layout, weight, arch) and weight.name not in slots:
            raise RuntimeError(f"rank {rank} should hold {weight.name}; expected Megatron-Core's even pipeline split")

    def whole(slot: Slot) -> Tensor:
        return slot.parameter if tensor_of is None else tensor_of(cast(nn.Parameter, slot.parameter))

    sample = whole(next(slot for slot in slots.values() if slot.weight.trained))

    def local(weight: Weight) -> Tensor:
        parameter, tensor = slots[weight.name].parameter, whole(slots[weight.name])
        expected = _dtype(weight, sample)
        if tensor.dtype != expected or tensor.shape != parameter.shape:
            raise RuntimeError(
                f"{weight.name}: a {tensor.dtype} tensor of shape {tuple(tensor.shape)} was to be exported; "
                f"expected {expected} and {tuple(parameter.shape)}"
            )
        return slots[weight.name].of(tensor).detach()

    elements = bucket_bytes // sample.dtype.itemsize
    of_message = elements // MESSAGES
    buckets = _buckets(weights, elements - of_message // 2)  # two buckets and a message are 2 * bucket_bytes
    _check_agreement(bucket_bytes, sample)
    rooms: Iterator[Tensor | None] = itertools.repeat(None)
    if reuse and rank == DESTINATION:
        # Memory that is new for each bucket costs a CPU more in page faults than the copy into it.
        largest = max(sum(w.elements() for w in bucket) * _dtype(bucket[0], sample).itemsize for bucket in buckets)
        rooms = itertools.cycle([sample.new_empty(largest, dtype=torch.uint8) for _ in buckets[:2]])
    held = [
        [[(w, holders(layout, w, arch)) for w in message] for message in _buckets(bucket, of_message)]
        for bucket in buckets
    ]
    return (_gather(messages, local, sample, room) for messages, room in zip(held, rooms, strict=False))


def model_ranks(layout: Layout, rank: int) -> ModelRanks:
    at = layout.coordinates(rank)
    return ModelRanks(
        tp_rank=at.tp,
        tp_size=layout.tp,
        ep_rank=at.ep,
        ep_size=layout.ep,
        etp_rank=at.etp,
        etp_size=layout.etp,
    )


def holders(layout: Layout, weight: Weight, arch: Architecture) -> range:
    """The ranks of the first replica that hold the weight's shards, in shard order."""
    if isinstance(weight.at, int):
        split = layout.split(arch.num_layers)
        stage = next(number for number, layers in enumerate(split) if weight.at in layers) % layout.pp
    else:
        stage = 0 if weight.at == "first" else layout.pp - 1
    first, size = stage * layout.stage_size, layout.tp
    if weight.expert is not None:
        first += layout.etp * (weight.expert // (arch.num_experts // layout.ep))
        size = layout.etp
    return range(first, first + (size if weight.sharding.split else 1))


def _dtype(weight: Weight, sample: Tensor) -> torch.dtype:
    return sample.dtype if weight.trained else torch.float32


def _buckets(weights: Sequence[Weight], max_elements: int) -> list[list[Weight]]:
    """Consecutive weights of one dtype, as many as fit; those of one tensor are together."""
    buckets: list[list[Weight]] = []
    filled = max_elements
    for _, group in itertools.groupby(weights, _tensors):
        together = list(group)
        elements = sum(weight.elements() for weight in together)
        if not buckets or filled + elements > max_elements or together[0].trained != buckets[-1][-1].trained:
            buckets.append([])
            filled = 0
        buckets[-1] += together
        filled += elements
    return buckets


def _tensors(weight: Weight) -> list[str]:
    return [source.name for source in weight.sources]


def _gather(
    messages: Sequence[_Held], local: Callable[[Weight], Tensor], like: Tensor, room: Tensor | None
) -> list[tuple[str, Tensor]]:
    """One bucket, cut into messages: whole tensors on rank 0, one after the other in `room`, and [] elsewhere.

    `room` has bytes; None: new memory.
    """
    rank = dist.get_rank()
    if rank != DESTINATION:
        for message in messages:
            mine = [local(weight).reshape(-1) for weight, holders in message if rank in holders]
            if mine:
                _transfer([dist.P2POp(dist.isend, torch.cat(mine), DESTINATION)])
            del mine
        return []
    dtype = _dtype(messages[0][0][0], like)
    sources = {source.name: source.whole for message in messages for weight, _ in message for source in weight.sources}
    sizes = [math.prod(source.shape) for source in sources.values()]
    size = sum(sizes) * dtype.itemsize
    flat = (like.new_empty(size, dtype=torch.uint8) if room is None else room[:size]).view(dtype)
    parts = zip(sources.items(), flat.split(sizes), strict=True)
    wholes = {name: part.view(source.shape) for (name, source), part in parts}
    for message in messages:
        received = _receive(message, like)

        def shards(holders: range, weight: Weight, received: dict[int, Iterator[Tensor]] = received) -> list[Tensor]:
            return [local(weight) if holder == DESTINATION else next(received[holder]) for holder in holders]

        assemble(((weight, shards(holders, weight)) for weight, holders in message), wholes)
        del received, shards
    return list(wholes.items())


def _receive(message: _Held, like: Tensor) -> dict[int, Iterator[Tensor]]:
    """What each other holder sends in the message, shard by shard in its order; `like` is on the device."""
    shapes: dict[int, list[tuple[int, ...]]] = {}
    for weight, holders in message:
        for number, holder in enumerate(holders):
            if holder != DESTINATION:
                shapes.setdefault(holder, []).append(weight.cut(number, len(holders))[0])
    counts = {holder: [math.prod(shape) for shape in shapes[holder]] for holder in shapes}
    flats = {holder: like.new_empty(sum(counts[holder]), dtype=_dtype(message[0][0], like)) for holder in shapes}
    _transfer([dist.P2POp(dist.irecv, flat, holder) for holder, flat in flats.items()])
    return {holder: map(Tensor.view, flat.split(counts[holder]), shapes[holder]) for holder, flat in flats.items()}


def _transfer(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


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
