"""Values of a weight: from files into a rank's shard, and from all shards into whole tensors.

Both copy along the pieces of weight.py, so there is no second description to disagree with the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_rl.models.weight import Source, Weight


@torch.no_grad()
def fill(weight: Weight, shard: Tensor, read: Callable[[Source, int, int, int], Tensor], rank: int, size: int) -> None:
    """Writes rank's shard of `size`; read(source, dim, start, length) gives a stretch of a source."""
    shape, pieces = weight.cut(rank, size)
    if tuple(shard.shape) != shape:
        raise ValueError(f"{weight.name}: the shard has shape {tuple(shard.shape)}; expected {shape}")
    dim = weight.sharding.dim
    if sum(piece.length for piece in pieces) < shape[dim]:
        shard.zero_()
    for piece in pieces:
        stretch = read(weight.sources[piece.source], dim, piece.start, piece.length)
        shard.narrow(dim, piece.offset, piece.length).copy_(stretch)


@torch.no_grad()
def reshard(weight: Weight, shards: Sequence[Tensor], rank: int, size: int) -> Tensor:
    """Returns rank's shard of `size` of a weight, from all its shards under another number of ranks."""
    pieces = [(piece, shard) for n, shard in enumerate(shards) for piece in weight.cut(n, len(shards))[1]]

    def read(source: Source, dim: int, start: int, length: int) -> Tensor:
        found = []
        for piece, shard in sorted(pieces, key=lambda each: each[0].start):
            begin, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if weight.sources[piece.source] is source and begin < end:
                found.append(shard.narrow(dim, piece.offset + begin - piece.start, end - begin))
        return torch.cat(found, dim)

    shard = shards[0].new_empty(weight.cut(rank, size)[0])
    fill(weight, shard, read, rank, size)
    return shard


@torch.no_grad()
def join(parts: Sequence[Source], values: Sequence[Tensor]) -> Tensor:
    """Returns the tensor whose parts have these values, in the widest of their dtypes; they are all of its parts."""
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in values))
    whole = torch.empty(parts[0].whole.shape, dtype=dtype)
    for part, each in zip(parts, values, strict=True):
        part.of(whole).copy_(each)
    return whole


@torch.no_grad()
def assemble(
    weights: Iterable[tuple[Weight, Sequence[Tensor]]], wholes: dict[str, Tensor] | None = None
) -> list[tuple[str, Tensor]]:
    """Returns (Hugging Face name, whole tensor) of the weights' sources, from the shards of all ranks.

    `weights` have every part of a tensor that one of them is a part of. Tensors of `wholes` are filled, others made.
    """
    wholes = {} if wholes is None else wholes
    for weight, shards in weights:
        dim = weight.sharding.dim
        for source in weight.sources:
            if source.name not in wholes:
                wholes[source.name] = shards[0].new_empty(source.whole.shape)
        views = [source.of(wholes[source.name]) for source in weight.sources]
        for rank, shard in enumerate(shards):
            for piece in weight.cut(rank, len(shards))[1]:
                stretch = shard.narrow(dim, piece.offset, piece.length)
                views[piece.source].narrow(dim, piece.start, piece.length).copy_(stretch)
    return list(wholes.items())
