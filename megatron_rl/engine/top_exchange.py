"""Moves mu's most likely tokens from the leaders that fetched them to the ranks that compute the loss.

They are a hundred times as large as the tokens, so only the last pipeline stage gets them, packed, one micro-batch
after another. They move to another leader only with their sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch, PackedTop, pack_top
from megatron_rl.data.sample import Sample
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.migration import migrate
from megatron_rl.ranks.place import Place


class TopExchange:
    """Gives the last pipeline stage the top tokens that it trains on. Each leader holds those of its own samples."""

    def __init__(self, k: int, place: Place, layout: Layout) -> None:
        """`k` tokens for each token of a response. Collective over a replica."""
        self._k = k
        self._place = place
        self._layout = layout
        self._needs = place.pp == layout.pp - 1
        needs = all_gather_bytes(b"1" if self._needs else b"0", place.replica)
        self._takers = [rank for rank, each in enumerate(needs) if each == b"1" and rank > 0]

    def migrate(
        self, tops: Mapping[int, TopTokens], home: Mapping[int, int], target: Mapping[int, int]
    ) -> dict[int, TopTokens]:
        """Moves the tokens of sample i from replica `home[i]` to replica `target[i]`; returns this leader's. Collective
        over the data-parallel leaders; {} on other ranks."""
        return migrate(tops, home, target, self._place, self._layout, TopTokens.from_bytes)[0]

    def scatter(
        self,
        tops: Mapping[int, TopTokens],
        samples: Sequence[Sequence[tuple[int, Sample]]],
        packed: Sequence[PackedBatch],
    ) -> tuple[PackedBatch, ...]:
        """Returns the micro-batches with their top tokens on the last pipeline stage, and as they are elsewhere.
        `samples`: the numbered samples of each. Collective over a replica."""
        return tuple(self._one(tops, part, batch) for part, batch in zip(samples, packed, strict=True))

    def _one(
        self, tops: Mapping[int, TopTokens], part: Sequence[tuple[int, Sample]], batch: PackedBatch
    ) -> PackedBatch:
        if batch.is_empty or not (self._needs or self._place.leads_replica):
            return batch
        group = self._place.replica
        if self._place.leads_replica:
            top = pack_top([sample for _, sample in part], [tops[index] for index, _ in part], batch.cu_seqlens)
            for rank in self._takers:
                for array in (top.ids, top.logprobs):
                    dist.send(torch.from_numpy(array), group_dst=rank, group=group)
        else:
            shape = (batch.tokens, self._k)
            top = PackedTop(np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32))
            for array in (top.ids, top.logprobs):
                dist.recv(torch.from_numpy(array), group_src=0, group=group)
        return dataclasses.replace(batch, top=top) if self._needs else batch
