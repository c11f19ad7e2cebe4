"""How attention in plain PyTorch reads a packed micro-batch: which rows go into which padded call, and their angles.

The packing itself, and the order of context parallelism, are made in megatron_rl.data.packing, without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.data.packing import cp_index
from megatron_rl.engine.device import put
from megatron_rl.engine.layers.chunk_plan import ChunkPlan
from megatron_rl.engine.layers.rotary import Turns, rotate


@dataclass(frozen=True)
class AttentionBatch:
    """Sequences of similar length, as rows of one padded attention call.

    queries [B, S_q] indexes this rank's tokens, keys [B, S_k] the tokens gathered over context parallelism; positions
    [B or 1, S_q] are those of the queries in their sequences. Keys lie at the positions 0, 1, ...
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor

    def mask(self, window: int | None, sink: bool) -> Tensor:
        """Returns [B or 1, 1, S_q, S_k], True if the query may look at the key: at its own token's and those before it,
        `window` in all. With `sink` there is one more key, which every query may look at."""
        last = self.positions[:, :, None]
        keys = torch.arange(self.keys.shape[1], device=last.device)
        seen = keys <= last
        if window is not None:
            seen &= keys > last - window
        return (F.pad(seen, (0, 1), value=True) if sink else seen).unsqueeze(1)


Masks = tuple[Tensor | None, ...]
"""The mask of each batch of a plan; None if plain causality says it all."""


@dataclass(frozen=True)
class AttentionPlan:
    """The calls, and for each of this rank's tokens [T] the row of their concatenated output and its position in its
    sequence."""

    batches: tuple[AttentionBatch, ...]
    order: Tensor
    positions: Tensor
    is_whole: bool  # whether this rank has all queries of its sequences


@dataclass
class PlannedSequences(PackedSeqParams):
    """Megatron-Core's description of packed sequences, with the plan. Masks have a byte for each query and key: of a
    class of lengths, or of each sequence under context parallelism."""

    attention: AttentionPlan = field(kw_only=True)
    chunked: Callable[[int], ChunkPlan] = field(kw_only=True)  # asked by chunks()
    _rotation: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, bool], Masks] = field(default_factory=dict)
    _chunks: dict[int, ChunkPlan] = field(default_factory=dict)

    def masks(self, window: int | None, sink: bool) -> Masks:
        """Returns the plan's masks for layers with this window; see AttentionBatch. They are made once."""
        key = window, sink
        if self.attention.is_whole and window is None and not sink:
            return (None,) * len(self.attention.batches)
        if key not in self._masks:
            self._masks[key] = tuple(batch.mask(window, sink) for batch in self.attention.batches)
        return self._masks[key]

    def chunks(self, before: int) -> ChunkPlan:
        """Returns how a recurrence goes through the tokens, each chunk with the `before` tokens before it."""
        if before not in self._chunks:
            self._chunks[before] = self.chunked(before)
        return self._chunks[before]

    def turn(self, turns: Turns) -> None:
        """Keeps the cosine and sine of each token's position; every layer turns alike.

        Megatron-Core's own rotary embedding, without fused kernels, goes through the sequences one by one, in every
        layer, and on a GPU waits for their lengths.
        """
        if not self._rotation:
            self._rotation[torch.float32] = turns.at(self.attention.positions)

    def rotate(self, x: Tensor) -> Tensor:
        """Applies the rotary embedding to x [T, 1, heads, D], in its dtype; to the first elements of a head, if only a
        part of it turns."""
        if x.dtype not in self._rotation:
            cosine, sine = self._rotation[torch.float32]
            self._rotation[x.dtype] = cosine.to(x.dtype), sine.to(x.dtype)
        return rotate(x, *self._rotation[x.dtype])


def attention_plan(cu_seqlens: npt.NDArray[np.integer], cp: int, cp_rank: int, device: torch.device) -> AttentionPlan:
    """cu_seqlens [S + 1] of the whole batch. Sequences share a call when their lengths have the same power of two."""
    mine = cp_index(cu_seqlens, cp, cp_rank)
    in_gathered = np.argsort(np.concatenate([cp_index(cu_seqlens, cp, rank) for rank in range(cp)]))
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    local_starts = starts // cp
    classes = np.frexp(lengths)[1]
    batches = []
    slot_of = np.empty(len(mine), dtype=np.int64)
    slots = 0
    for length_class in np.unique(classes):
        members = np.flatnonzero(classes == length_class)
        q_rows = _padded_ranges(local_starts[members], lengths[members] // cp)
        k_rows = _padded_ranges(starts[members], lengths[members])
        q_position = np.arange(q_rows.shape[1])[None]
        if cp > 1:
            q_position = mine[q_rows.clip(0)] - starts[members][:, None]
        real = q_rows >= 0
        slot_of[q_rows[real]] = slots + np.flatnonzero(real)
        slots += real.size
        batches.append(
            AttentionBatch(
                queries=put(q_rows.clip(0), device),
                keys=put(in_gathered[k_rows.clip(0)], device),
                positions=put(q_position, device),
            )
        )
    positions = mine - np.repeat(starts, lengths)[mine]
    return AttentionPlan(tuple(batches), put(slot_of, device), put(positions, device), is_whole=cp == 1)


def _padded_ranges(starts: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """[B, max length]: start, start + 1, ... per row, then -1."""
    steps = np.arange(lengths.max())
    return np.where(steps < lengths[:, None], starts[:, None] + steps, -1).astype(np.int64)
