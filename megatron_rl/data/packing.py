"""Packs a micro-batch's samples into one row (THD), and orders tokens for context parallelism. NumPy, no torch.

Sequences are not padded to the longest. Under context parallelism each sequence is padded to a multiple of 2 * cp.
Under sequence parallelism the last sequence is padded until the row divides among the ranks. Padding repeats its
sequence from the start. Real tokens come earlier, so they do not attend to it, and it is outside every loss mask.
Repeated sequences visit many experts; a single repeated token would load only a few.

An empty micro-batch is a row of padding, one sequence long. It lets its replica take part in the pipeline schedule and
the all-to-alls without changing any loss or metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megatron_rl.data.sample import Sample
from megatron_rl.data.top_tokens import TopTokens

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class PackedTop:
    """mu's most likely tokens for the label of each position; meaningless outside the loss mask."""

    ids: npt.NDArray[np.int32]  # [T, k]
    logprobs: Floats  # [T, k] log mu; -inf for a token that is missing


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of S sequences in T positions, padding included. Every array but cu_seqlens and top is [T].

    An empty micro-batch has S = 1: a sequence of padding.

    Position t holds the label, loss mask, rollout log-prob, weight version and advantage of token t + 1, which it
    predicts.
    """

    token_ids: Ints
    position_ids: Ints
    labels: Ints
    loss_mask: Bools
    rollout_logprobs: Floats
    versions: Ints  # weight version under which the token was generated, 0 outside of responses
    advantages: Floats
    sequence_ids: Ints
    valid: Bools  # False on padding
    cu_seqlens: Ints  # [S + 1], of the padded sequences
    top: PackedTop | None = None  # for score centering, on the last pipeline stage alone

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Whether it has no samples, so that no loss or metric counts it."""
        return not self.valid.any()


def pack(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    *,
    cp: int = 1,
    tp: int = 1,
    multiple: int = 1,
    total: int | None = None,
    filler: npt.NDArray[np.integer] | None = None,
) -> PackedBatch:
    """Packs the samples in their order, each with one advantage for its whole response.

    Each rank's tokens divide by `multiple`. `total` pads the row to that many positions, which must divide among the
    ranks. Without samples the row is empty and repeats the tokens of `filler`, or token 0. Raises ValueError if the
    first token of a sample is in the loss mask, because nothing predicts it.
    """
    if not samples:
        filler = np.zeros(1, dtype=np.int64) if filler is None else filler
        return _pack_empty(filler, cp=cp, tp=tp, multiple=multiple, total=total)
    for sample in samples:
        if not len(sample.token_ids) or sample.loss_mask[0]:
            raise ValueError(
                f"prompt {sample.prompt.id!r} sample {sample.index}: its first token cannot be trained on; "
                "a prompt needs at least one token"
            )
    lengths = padded_lengths([len(s.token_ids) for s in samples], cp=cp, tp=tp, multiple=multiple, total=total)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int64)
    ids = [s.token_ids.astype(np.int64) for s in samples]
    masks = [s.loss_mask[1:] for s in samples]
    weights = [mask * np.float32(advantage) for mask, advantage in zip(masks, advantages, strict=True)]
    return PackedBatch(
        token_ids=pack_rows(ids, cu_seqlens, repeat=True),
        position_ids=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        labels=pack_rows([np.roll(i, -1) for i in ids], cu_seqlens, repeat=True),
        loss_mask=pack_rows(masks, cu_seqlens),
        rollout_logprobs=pack_rows([s.rollout_logprobs[1:] for s in samples], cu_seqlens),
        versions=pack_rows([_versions(s)[1:] for s in samples], cu_seqlens),
        advantages=pack_rows(weights, cu_seqlens),
        sequence_ids=np.repeat(np.arange(len(samples)), lengths),
        valid=pack_rows([np.ones(len(i), dtype=np.bool_) for i in ids], cu_seqlens),
        cu_seqlens=cu_seqlens,
    )


def _versions(sample: Sample) -> Ints:
    """Returns the weight version of each token, 0 for those of the prompt."""
    versions = np.zeros(len(sample.token_ids), dtype=np.int64)
    for span in sample.versions:
        versions[span.start : span.end] = span.version
    return versions


def _pack_empty(filler: npt.NDArray[np.integer], *, cp: int, tp: int, multiple: int, total: int | None) -> PackedBatch:
    (length,) = padded_lengths([1], cp=cp, tp=tp, multiple=multiple, total=total)
    ids = np.resize(filler.astype(np.int64), length)
    nothing, absent = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.bool_)
    return PackedBatch(
        token_ids=ids,
        position_ids=np.arange(length, dtype=np.int64),
        labels=np.roll(ids, -1),
        loss_mask=absent,
        rollout_logprobs=nothing,
        versions=np.zeros(length, dtype=np.int64),
        advantages=nothing,
        sequence_ids=np.zeros(length, dtype=np.int64),
        valid=absent,
        cu_seqlens=np.array([0, length], dtype=np.int64),
    )


def pack_top(samples: Sequence[Sample], tops: Sequence[TopTokens], cu_seqlens: npt.NDArray[np.integer]) -> PackedTop:
    """Lays out the top tokens of each sample's response as `pack` lays out the labels of the samples."""

    def row(values: npt.NDArray[T], sample: Sample) -> npt.NDArray[T]:
        # The label of the last prompt token is the response's first.
        before = np.zeros((len(sample.prompt.token_ids) - 1, values.shape[1]), dtype=values.dtype)
        return np.concatenate([before, values])

    pairs = list(zip(samples, tops, strict=True))
    return PackedTop(
        ids=pack_rows([row(top.ids, sample) for sample, top in pairs], cu_seqlens),
        logprobs=pack_rows([row(top.logprobs, sample) for sample, top in pairs], cu_seqlens),
    )


def pack_rows(
    rows: Sequence[npt.NDArray[T]], cu_seqlens: npt.NDArray[np.integer], *, repeat: bool = False
) -> npt.NDArray[T]:
    """Writes each sequence's [n, ...] into the row [cu_seqlens[-1], ...]. Padding stays zero, or repeats the sequence.

    All values by token, routing traces included, are laid out here and nowhere else.
    """
    row = np.zeros((int(cu_seqlens[-1]), *rows[0].shape[1:]), dtype=rows[0].dtype)
    for part, start, end in zip(rows, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if len(part) > end - start:
            raise ValueError(f"{len(part)} rows for a sequence of {end - start} positions")
        row[start : start + len(part)] = part
        if repeat:
            row[start:end] = np.resize(part, (end - start, *part.shape[1:]))
    return row


def pack_all(
    micro_batches: Sequence[Sequence[tuple[Sample, float]]], *, cp: int, tp: int, equal: bool, multiple: int = 1
) -> tuple[PackedBatch, ...]:
    """Packs each micro-batch's (sample, advantage) pairs; `equal` makes all rows as long as the longest.

    Empty micro-batches repeat the first sample, because its tokens visit many experts and one repeated token would not.
    """
    total = None
    if equal:
        lengths = [[len(s.token_ids) for s, _ in part] or [1] for part in micro_batches]
        total = max(sum(padded_lengths(each, cp=cp, tp=tp, multiple=multiple)) for each in lengths)
    filler = next((s.token_ids for part in micro_batches for s, _ in part), None)
    return tuple(
        pack([s for s, _ in part], [a for _, a in part], cp=cp, tp=tp, multiple=multiple, total=total, filler=filler)
        for part in micro_batches
    )


def padded_lengths(
    lengths: Sequence[int], *, cp: int, tp: int, multiple: int = 1, total: int | None = None
) -> list[int]:
    """Length of each sequence in the row. Raises ValueError if `total` is too small or does not divide."""
    chunks = 2 * cp if cp > 1 else 1
    padded = [-(-n // chunks) * chunks for n in lengths]
    # Each context-parallel rank's tokens divide among the tensor-parallel ranks.
    row = math.lcm(chunks, cp * tp * multiple)
    wanted = -(-sum(padded) // row) * row if total is None else total
    if wanted < sum(padded) or wanted % row:
        raise ValueError(f"a row of {wanted} positions cannot hold {sum(padded)} in multiples of {row}")
    padded[-1] += wanted - sum(padded)
    return padded


def cp_index(cu_seqlens: npt.NDArray[np.integer], cp: int, rank: int) -> Ints:
    """Positions [T / cp] of the row that a context-parallel rank holds, in its order.

    Each sequence is cut into 2 * cp chunks. Rank r holds chunks r and 2 * cp - 1 - r, so causal attention costs every
    rank the same. Megatron-Core and Transformer Engine use this order for packed sequences; only this function makes
    it. Under sequence parallelism each tensor-parallel rank holds one of tp equal runs of this order.

    Raises ValueError if a sequence does not divide.
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


def rank_rows(cu_seqlens: npt.NDArray[np.integer], *, cp: int, cp_rank: int, tp: int, tp_rank: int) -> Ints:
    """Positions [T / (cp * tp)] of the row whose tokens pass through a rank's routers, in their order."""
    return np.split(cp_index(cu_seqlens, cp, cp_rank), tp)[tp_rank]
