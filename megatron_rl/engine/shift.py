"""The router shift of whole micro-batches, from what each rank has of their rows and layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch, rank_rows
from megatron_rl.engine.parallel import Place


def packed_shift(
    distances: Sequence[Tensor], batches: Sequence[PackedBatch], moe_layers: int, layout: Layout, place: Place
) -> list[Tensor]:
    """[T] fp32 for each micro-batch, in packed order, on every rank of the replica; collective over it.

    `distances`, [rows] each, are sums over a rank's own layers (routing.shift.RouterShift); `moe_layers` counts the
    layers of the whole model.
    """
    placed = []
    for sums, batch in zip(distances, batches, strict=True):
        rows = rank_rows(batch.cu_seqlens, cp=layout.cp, cp_rank=place.cp, tp=layout.tp, tp_rank=place.tp)
        whole = torch.zeros(batch.tokens)
        whole[torch.from_numpy(rows)] = sums.cpu()
        placed.append(whole)
    # Stages hold other layers of the same rows; tensor- and context-parallel ranks hold other rows, and 0 in these. So
    # one sum does both.
    everyone = torch.cat(placed)
    dist.all_reduce(everyone, group=place.replica)
    shift = everyone.div(moe_layers).neg().exp().to(distances[0].device)
    return list(shift.split([batch.tokens for batch in batches]))
