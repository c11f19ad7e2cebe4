"""Puts the servers' weights in the place of the trainer's for the verification of a weight sync under stress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.engine.export import DESTINATION, model_ranks
from megatron_rl.engine.policy import Policy
from megatron_rl.models.binding import Slot, bind
from megatron_rl.models.registry import weights_of
from megatron_rl.models.shards import fill
from megatron_rl.models.weight import Shape, Source
from megatron_rl.ranks.collectives import broadcast_bytes, together
from megatron_rl.weights.all_servers import WeightSyncError


@contextlib.contextmanager
def substituted(policy: Policy, bucket_bytes: int, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Gives the policy changed weights until the end of the block, then its own ones back, to the bit. Collective.

    `change(name, weight)` changes one whole exported tensor; every rank calls it and keeps its own shards. Holds a
    second copy of the rank's weights meanwhile. Raises WeightSyncError if an exported tensor is not what the ranks
    hold.
    """
    policy.gather_weights()
    held = [tensor for model in policy.models for tensor in (*model.parameters(), *model.buffers())]
    own = [(tensor, tensor.detach().clone()) for tensor in held]
    try:
        wrong = _replace(policy, bucket_bytes, change)
        with together(policy.place.control):
            if wrong:
                raise WeightSyncError(f"weight sync: {wrong[0]} is exported with other values than the trainer's own")
        yield
    finally:
        with torch.no_grad():
            for tensor, weight in own:
                tensor.copy_(weight)


def _replace(policy: Policy, bucket_bytes: int, change: Callable[[str, Tensor], Tensor]) -> list[str]:
    """Returns the names of weights that were exported wrongly."""
    ranks = model_ranks(policy.layout, policy.place.rank)
    slots: dict[str, list[Slot]] = {}  # by first source: tied embeddings may be in two slots
    for slot in bind(list(policy.models), policy.arch, ranks, policy.layers.weight_names):
        slots.setdefault(slot.weight.sources[0].name, []).append(slot)
    shapes = {source.name: source.whole.shape for weight in weights_of(policy.arch) for source in weight.sources}
    wrong = []
    for bucket in policy.export(bucket_bytes):
        tensors = _broadcast(bucket, shapes, policy)
        changed = {name: change(name, tensor) for name, tensor in tensors.items()}
        for slot in (slot for name in tensors for slot in slots.get(name, ())):
            weight, shard, share = slot.weight, slot.of(slot.parameter.data), ranks.share(slot.weight)
            dim = weight.sharding.dim
            for piece in weight.cut(*share)[1]:
                source = weight.sources[piece.source]
                exported = source.of(tensors[source.name]).narrow(dim, piece.start, piece.length)
                if not torch.equal(shard.narrow(dim, piece.offset, piece.length), exported):
                    wrong.append(weight.name)
            fill(weight, shard, _reader(changed), *share)
    return wrong


def _reader(tensors: Mapping[str, Tensor]) -> Callable[[Source, int, int, int], Tensor]:
    return lambda source, dim, start, length: source.of(tensors[source.name]).narrow(dim, start, length)


def _broadcast(bucket: list[tuple[str, Tensor]], shapes: Mapping[str, Shape], policy: Policy) -> dict[str, Tensor]:
    """Returns rank 0's tensors on every rank, by name. Collective."""
    mine = [[name for name, _ in bucket], *{str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket}]
    names, dtype = orjson.loads(broadcast_bytes(orjson.dumps(mine), policy.place.control))
    sizes = [torch.Size(shapes[name]).numel() for name in names]
    if dist.get_rank() == DESTINATION:
        flat = torch.cat([tensor.reshape(-1) for _, tensor in bucket])
    else:
        flat = next(policy.models[0].parameters()).new_empty(sum(sizes), dtype=getattr(torch, dtype))
    dist.broadcast(flat, src=DESTINATION)
    return {name: part.view(shapes[name]) for name, part in zip(names, flat.split(sizes), strict=True)}
