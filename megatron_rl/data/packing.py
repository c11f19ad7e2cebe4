"""Packing a micro-batch's samples into one row (THD), and the order of context parallelism. NumPy, no torch.

Nothing is padded to the longest. Under context parallelism each sequence is lengthened to a multiple of 2 * cp; under
sequence parallelism the last one until the row divides among the ranks. Padding repeats its sequence from the start:
nothing real attends to it, for it comes later; it is in no loss mask; and it visits many experts, where one token
repeated would send all of it to the same few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_rl.data.sample import Sample

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of S sequences in T positions, padding included. Every array but cu_seqlens is [T].

    What concerns a token stands where it is predicted, one position before its own: labels, loss_mask, rollout_logprobs
    and advantages at position t are those of token t + 1.
    """

    token_ids: Ints
    position_ids: Ints
    labels: Ints
    loss_mask: Bools
    rollout_logprobs: Floats
    advantages: Floats
    sequence_ids: Ints
    valid: Bools  # False on padding
    cu_seqlens: Ints  # [S + 1], of the lengthened sequences

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


def pack(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    *,
    cp: int = 1,
    tp: int = 1,
    total: int | None = None,
) -> PackedBatch:
    """The samples in their order, each with one advantage for its whole response.

    `total` lengthens the row to so many positions, which must divide among the ranks. Raises ValueError for a sample
    whose first token is in the loss mask: nothing predicts it.
    """
    lengths = padded_lengths([len(s.token_ids) for s in samples], cp=cp, tp=tp, total=total)
    parts = [_place(s, a, n, i) for i, (s, a, n) in enumerate(zip(samples, advantages, lengths, strict=True))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return PackedBatch(**columns, cu_seqlens=np.cumsum([0, *lengths], dtype=np.int64))


def pack_all(
    micro_batches: Sequence[Sequence[tuple[Sample, float]]], *, cp: int, tp: int, equal: bool
) -> tuple[PackedBatch, ...]:
    """Each micro-batch's (sample, advantage) pairs packed; `equal` makes all rows as long as the longest."""
    total = None
    if equal:
        total = max(sum(padded_lengths([len(s.token_ids) for s, _ in part], cp=cp, tp=tp)) for part in micro_batches)
    return tuple(pack([s for s, _ in part], [a for _, a in part], cp=cp, tp=tp, total=total) for part in micro_batches)


def padded_lengths(lengths: Sequence[int], *, cp: int, tp: int, total: int | None = None) -> list[int]:
    """Length of each sequence in the row. Raises ValueError when `total` is too small or does not divide."""
    multiple = 2 * cp if cp > 1 else 1
    padded = [-(-n // multiple) * multiple for n in lengths]
    # Each context-parallel rank's tokens divide among the tensor-parallel ranks.
    row = math.lcm(multiple, cp * tp)
    wanted = -(-sum(padded) // row) * row if total is None else total
    if wanted < sum(padded) or wanted % row:
        raise ValueError(f"a row of {wanted} positions cannot hold {sum(padded)} in multiples of {row}")
    padded[-1] += wanted - sum(padded)
    return padded


def _place(sample: Sample, advantage: float, length: int, sequence: int) -> dict[str, npt.NDArray[Any]]:
    """One sequence's columns of the PackedBatch, lengthened to `length`."""
    n = len(sample.token_ids)
    if not n or sample.loss_mask[0]:
        raise ValueError(
            f"prompt {sample.prompt.id!r} sample {sample.index}: its first token cannot be trained on; "
            "a prompt needs at least one token"
        )
    repeated = np.resize(sample.token_ids, length + 1).astype(np.int64)
    mask = np.zeros(length, dtype=np.bool_)
    mask[: n - 1] = sample.loss_mask[1:]
    logprobs = np.zeros(length, dtype=np.float32)
    logprobs[: n - 1] = sample.rollout_logprobs[1:]
    return {
        "token_ids": repeated[:-1],
        "position_ids": np.arange(length, dtype=np.int64),
        "labels": repeated[1:],
        "loss_mask": mask,
        "rollout_logprobs": logprobs,
        "advantages": mask * np.float32(advantage),
        "sequence_ids": np.full(length, sequence, dtype=np.int64),
        "valid": np.arange(length) < n,
    }


def cp_index(cu_seqlens: npt.NDArray[np.integer], cp: int, rank: int) -> Ints:
    """Positions of the row that a context-parallel rank holds, in its order: [T / cp].

    Each sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r, so that causal attention costs
    every rank the same. This is Megatron-Core's and Transformer Engine's order for packed sequences, and the only place
    where it is made. Under sequence parallelism each tensor-parallel rank holds one of tp equal runs of this order.

    Raises ValueError for a sequence that does not divide.
    """
    if cp == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    if (lengths % (2 * cp)).any():
        raise ValueError(f"sequence lengths {lengths.tolist()} are not all multiples of 2 * cp = {2 * cp}")
    chunks = []
    for start, chunk in zip(starts, lengths // (2 * cp), strict=True):
        for part in (rank, 2 * cp - 1 - rank):
            chunks.append(np.arange(start + part * chunk, start + (part + 1) * chunk))
    return np.concatenate(chunks).astype(np.int64)


def cp_slice(array: npt.NDArray[T], cu_seqlens: npt.NDArray[np.integer], cp: int, rank: int) -> npt.NDArray[T]:
    """[T, ...] -> [T / cp, ...]: what a context-parallel rank holds of anything that goes by position."""
    return array[cp_index(cu_seqlens, cp, rank)]


def cp_unslice(slices: Sequence[npt.NDArray[T]], cu_seqlens: npt.NDArray[np.integer]) -> npt.NDArray[T]:
    """The inverse: the slices of all ranks, in their order -> [T, ...]."""
    cp = len(slices)
    order = np.concatenate([cp_index(cu_seqlens, cp, rank) for rank in range(cp)])
    whole = np.empty((len(order), *slices[0].shape[1:]), dtype=slices[0].dtype)
    whole[order] = np.concatenate(slices)
    return whole
