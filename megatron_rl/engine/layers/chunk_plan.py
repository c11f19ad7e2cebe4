"""How a recurrence goes through a packed micro-batch: in chunks of tokens, for all sequences at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rl.data.packing import cp_index
from megatron_rl.engine.device import put

CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True)
class ChunkPlan:
    """N chunks of CHUNK tokens, step by step: the first chunk of every sequence, then the second of those that have
    one, and so on. Longer sequences come first, so that a step's sequences are the first ones of the step before.

    A last chunk may be longer than what is left of its sequence, and nothing comes before a first chunk.
    """

    rows: Tensor  # [N, before + CHUNK] of the tokens gathered over context parallelism; 0 where there is none
    real: Tensor  # bool, of the same shape: whether there is one
    steps: tuple[int, ...]  # chunks of each step
    order: Tensor  # [T]: where in the chunks' N * CHUNK places each of this rank's tokens is


def chunk_plan(
    cu_seqlens: npt.NDArray[np.integer], cp: int, cp_rank: int, device: torch.device, before: int
) -> ChunkPlan:
    """cu_seqlens [S + 1] of the whole batch; each chunk has with it the `before` tokens before it in its sequence."""
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    chunks = -(-lengths // CHUNK)
    longest_first = np.argsort(-chunks, kind="stable")
    steps = [int((chunks > step).sum()) for step in range(chunks.max())]
    sequence = np.concatenate([longest_first[:count] for count in steps])
    step = np.repeat(np.arange(len(steps)), steps)
    position = step[:, None] * CHUNK + np.arange(-before, CHUNK)
    real = (position >= 0) & (position < lengths[sequence][:, None])
    token = np.where(real, starts[sequence][:, None] + position, 0)
    is_own = real[:, before:]
    place_of = np.empty(cu_seqlens[-1], dtype=np.int64)
    place_of[token[:, before:][is_own]] = np.flatnonzero(is_own)
    in_gathered = np.argsort(np.concatenate([cp_index(cu_seqlens, cp, rank) for rank in range(cp)]))
    return ChunkPlan(
        rows=put(in_gathered[token], device),
        real=put(real, device),
        steps=tuple(steps),
        order=put(place_of[cp_index(cu_seqlens, cp, cp_rank)], device),
    )
