"""Brings what routers know of their rows to the packed tokens: [T] for each micro-batch, on every rank of a replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch, rank_rows
from megatron_rl.ranks.place import Place
from megatron_rl.routing.drift import RoutingStats


def sum_over_replica(
    rows: Sequence[Tensor], batches: Sequence[PackedBatch], layout: Layout, place: Place
) -> list[Tensor]:
    """[T] fp32 on the CPU for each micro-batch, in packed order: the sum over the replica's ranks. Collective over it.

    `rows`, [R] each, are sums over a rank's own layers.
    """
    placed = []
    for sums, batch in zip(rows, batches, strict=True):
        at = rank_rows(batch.cu_seqlens, cp=layout.cp, cp_rank=place.cp, tp=layout.tp, tp_rank=place.tp)
        whole = torch.zeros(batch.tokens)
        whole[torch.from_numpy(at)] = sums.float().cpu()
        placed.append(whole)
    # Stages hold different layers of the same rows. Tensor- and context-parallel ranks hold other rows, and 0 here. So
    # one sum does both.
    everyone = torch.cat(placed)
    dist.all_reduce(everyone, group=place.replica)
    return list(everyone.split([batch.tokens for batch in batches]))


def expert_changes(
    stats: RoutingStats, batches: Sequence[PackedBatch], moe_layers: int, layout: Layout, place: Place
) -> dict[str, list[Tensor]]:
    """[T] fp32 for each micro-batch, by pair of routing/drift.py: the token's expert change, the mean over layers; NaN
    for a token that was not compared. Collective over a replica. `stats` must keep rows."""
    found = {}
    for pair, rows in stats.row_changes().items():
        changes = sum_over_replica([changes for changes, _ in rows], batches, layout, place)
        compared = sum_over_replica([valid for _, valid in rows], batches, layout, place)
        found[pair] = [
            (change / moe_layers).where(there > 0, torch.nan) for change, there in zip(changes, compared, strict=True)
        ]
    return found
