"""One logical weight: its tensors in Hugging Face's files, its name in Megatron-Core, and how ranks share it.

A sharding answers one question: which stretch of which Hugging Face tensor lies where in rank r's shard of n. Values
are copied along these pieces in shards.py. Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rl.models.kinds import WeightKind

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A source's place in a larger tensor, which joins several along their outputs, or stacks experts."""

    whole: Shape  # of the larger tensor
    index: int | None = None  # the expert, if the first dimension stacks them
    transposed: bool = False  # whether the tensor has a matrix as [in, out]
    offset: int = 0  # of the outputs: the source has those from `offset` on,
    step: int = 1  # each `step`-th of them


@dataclass(frozen=True)
class Source:
    """A tensor of the Hugging Face checkpoint, or a part of one."""

    name: str  # of the tensor
    shape: Shape  # [out, in] of a matrix
    part: Part | None = None  # None: the source is the whole tensor
    alone: str | None = None  # the tensor that is this part in files that have each part by itself, if there are such

    @property
    def whole(self) -> Source:
        """The tensor as a source."""
        return self if self.part is None else Source(self.name, self.part.whole)

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the view of the tensor that is this source, in the source's shape."""
        if self.part is None:
            return tensor
        view = tensor[self.stretch(0, 0, self.shape[0])]
        return view.t() if self.part.transposed else view

    def stretch(self, dim: int, start: int, length: int) -> tuple[slice | int, ...]:
        """Returns the index, into the tensor, of positions [start, start + length) of this source along `dim`; of a
        transposed part in the tensor's order."""
        if self.part is None:
            return *[slice(None)] * dim, slice(start, start + length)
        first, count = (start, length) if dim == 0 else (0, self.shape[0])
        first = self.part.offset + first * self.part.step
        within: list[slice | int] = [slice(None)] * len(self.shape)
        if dim:
            within[dim] = slice(start, start + length)
        within[0] = slice(first, first + (count - 1) * self.part.step + 1, self.part.step)
        if self.part.transposed:
            within.reverse()
        return tuple(within) if self.part.index is None else (self.part.index, *within)


@dataclass(frozen=True)
class Piece:
    """Positions [start, start + length) of source number `source` are those from `offset` in a shard."""

    source: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Sharding:
    """The sources are interleaved block by block along `dim`, and then cut into one shard per rank."""

    dim: int = 0
    blocks: int | None = 1  # block b holds the b-th part of each source; None: as many blocks as shards
    split: bool = True  # False: every rank holds the whole
    padded: bool = False  # zeros are added at the end until the shards are equal
    sections: tuple[int, ...] = ()  # extents of the parts of the only source, of each of which a shard has its share

    def cut(self, lengths: Sequence[int], rank: int, size: int) -> tuple[int, tuple[Piece, ...]]:
        """The extent along `dim` of rank's shard of `size`, and its pieces; zeros where no piece lies.

        `lengths` are the sources' extents along `dim`. Raises ValueError when they do not divide evenly.
        """
        if not self.split:
            rank, size = 0, 1
        if self.sections:
            return self._cut_sections(rank, size)
        blocks = size if self.blocks is None else self.blocks
        total = sum(lengths)
        if any(length % blocks for length in lengths) or (total % size and not self.padded):
            raise ValueError(f"extents {list(lengths)} do not divide into {blocks} blocks and {size} shards")
        extent = -(-total // size)
        first = rank * extent
        pieces = []
        position = 0
        for block in range(blocks):
            for source, length in enumerate(n // blocks for n in lengths):
                begin, end = max(position, first), min(position + length, first + extent)
                if begin < end:
                    start = block * length + begin - position
                    pieces.append(Piece(source, start, end - begin, begin - first))
                position += length
        return extent, tuple(pieces)

    def _cut_sections(self, rank: int, size: int) -> tuple[int, tuple[Piece, ...]]:
        if any(section % size for section in self.sections):
            raise ValueError(f"sections {list(self.sections)} do not divide into {size} shards")
        pieces, start, offset = [], 0, 0
        for section in self.sections:
            length = section // size
            pieces.append(Piece(0, start + rank * length, length, offset))
            start, offset = start + section, offset + length
        return offset, tuple(pieces)


REPLICATED = Sharding(split=False)
ROWS = Sharding()  # column-parallel linear layers: [out / n, in]
COLUMNS = Sharding(dim=1)  # row-parallel linear layers: [out, in / n]
VOCABULARY = Sharding(padded=True)
GATE_UP = Sharding(blocks=None)  # each rank: its part of gate, then its part of up


def grouped_qkv(num_kv_heads: int) -> Sharding:
    """Per key-value head: its query heads, its key, its value.

    With more ranks than key-value heads a shard is a part of a group, without regard to heads: Megatron-Core gathers
    the outputs of all ranks, and each rank takes its query heads and their key and value.
    """
    return Sharding(blocks=num_kv_heads)


@dataclass(frozen=True)
class Weight:
    """A weight under its Megatron-Core name, with global layer and expert numbers (both 0-based)."""

    name: str
    sources: tuple[Source, ...]
    sharding: Sharding
    at: int | Literal["first", "last"]  # the layer it belongs to, or the end of the pipeline that holds it
    kind: WeightKind
    expert: int | None = None  # set: shared over expert-tensor ranks, held by one expert-parallel rank
    copy: bool = False  # a second copy of tied embeddings: loaded, never exported
    optional: bool = False  # zero where the files lack it
    trained: bool = True  # False: a buffer, fp32 in every model, that has no gradient and never changes

    def cut(self, rank: int, size: int) -> tuple[Shape, tuple[Piece, ...]]:
        """Shape and pieces of rank's shard of `size`. Raises ValueError when it does not divide evenly."""
        try:
            extent, pieces = self.sharding.cut([s.shape[self.sharding.dim] for s in self.sources], rank, size)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; choose another tensor-parallel size") from None
        shape = list(self.sources[0].shape)
        shape[self.sharding.dim] = extent
        return tuple(shape), pieces

    def elements(self) -> int:
        """Counts the whole weight, without padding."""
        return sum(math.prod(source.shape) for source in self.sources)
