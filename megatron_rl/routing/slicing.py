"""Cuts out each rank's part of the routing traces: its rows and its layers, packed like the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rl.data.packing import pack_rows, rank_rows
from megatron_rl.data.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class RankRoutes:
    """Experts of one micro-batch's rows and layers on one rank.

    experts [rows, own layers, top_k] is uint8 up to 256 experts, else int16. present [rows] bool is False if the route
    is unknown. Rows are in the order in which the rank's routers see them: rank_rows of the packed batch.
    """

    experts: Tensor
    present: Tensor

    def to(self, device: torch.device) -> RankRoutes:
        return RankRoutes(self.experts.to(device), self.present.to(device))

    @property
    def bytes(self) -> int:
        return self.experts.nbytes + self.present.nbytes


@dataclass(frozen=True)
class RouteOwner:
    """The coordinates of a rank that decide its slice of the traces. Layers are global numbers, ascending."""

    tp: int
    cp: int
    layers: tuple[int, ...]


def ids_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16


def pack_traces(
    traces: Sequence[RoutingTrace], cu_seqlens: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]:
    """(experts [T, layers, top_k], present [T]) of a micro-batch's samples.

    `present` is False for rows that a trace lacks, and for padding.
    """
    experts = pack_rows([trace.experts for trace in traces], cu_seqlens)
    return experts, pack_rows([trace.present for trace in traces], cu_seqlens)


def slice_routes(
    traces: Sequence[RoutingTrace], cu_seqlens: npt.NDArray[np.integer], owner: RouteOwner, *, tp: int, cp: int
) -> RankRoutes:
    """The slice of `owner` of one micro-batch's traces."""
    experts, present = pack_traces(traces, cu_seqlens)
    rows = rank_rows(cu_seqlens, cp=cp, cp_rank=owner.cp, tp=tp, tp_rank=owner.tp)
    columns = [traces[0].layers.index(layer) for layer in owner.layers]
    mine = np.ascontiguousarray(experts[rows][:, columns])
    if mine.dtype == np.uint16:
        mine = mine.view(np.int16)  # torch's uint16 cannot be indexed; no model has 32768 experts
    return RankRoutes(torch.from_numpy(mine), torch.from_numpy(present[rows]))
