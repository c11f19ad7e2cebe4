"""Moves routing traces from the leaders that fetched them to the ranks whose routers replay them.

Tokens go to a whole replica. Traces are far larger, so each rank gets only its own rows and layers, one micro-batch
after another. A trace moves to another leader only with its sample.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import orjson
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch, rank_rows
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.models.architecture import Architecture
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.migration import migrate
from megatron_rl.ranks.place import Place
from megatron_rl.routing.drift import RoutingStats, peak_over_mean
from megatron_rl.routing.slicing import RankRoutes, RouteOwner, ids_dtype, slice_routes


class RouteExchange:
    """Gives every rank its slice of the traces that it trains on. Each leader holds the traces of its own samples."""

    def __init__(self, arch: Architecture, layers: Sequence[int], place: Place, layout: Layout) -> None:
        """`layers` are the global numbers of this rank's MoE layers. Collective."""
        self._arch = arch
        self._place = place
        self._layout = layout
        self._mine = RouteOwner(place.tp, place.cp, tuple(layers))
        owners = all_gather_bytes(orjson.dumps([place.tp, place.cp, list(layers)]), place.replica)
        self._owners = [RouteOwner(tp, cp, tuple(own)) for tp, cp, own in map(orjson.loads, owners)]
        self._bytes = 0
        self._seconds = 0.0

    def migrate(
        self, traces: Mapping[int, RoutingTrace], home: Mapping[int, int], target: Mapping[int, int]
    ) -> dict[int, RoutingTrace]:
        """Moves the trace of sample i from replica `home[i]` to replica `target[i]`; returns this leader's traces.

        Collective over the data-parallel leaders; {} on other ranks.
        """
        started = time.perf_counter()
        held, received = migrate(traces, home, target, self._place, self._layout, RoutingTrace.from_bytes)
        self._bytes += received
        self._seconds += time.perf_counter() - started
        return held

    def scatter(
        self, traces: Mapping[int, RoutingTrace], parts: Sequence[Sequence[int]], packed: Sequence[PackedBatch]
    ) -> tuple[RankRoutes, ...]:
        """This rank's slice of each micro-batch, whose samples `parts` names. Collective over a replica.

        An empty micro-batch has no routes, and routes live.
        """
        started = time.perf_counter()
        routes = tuple(
            self._absent(batch)
            if batch.is_empty
            else self._lead([traces[i] for i in part], batch)
            if self._place.leads_replica
            else self._follow(batch)
            for part, batch in zip(parts, packed, strict=True)
        )
        self._seconds += time.perf_counter() - started
        return routes

    def drain(self) -> dict[str, float]:
        """Cost of the traces since the last call: bytes that all ranks received, and seconds of the slowest rank.

        Collective over the world.
        """
        received, seconds = torch.tensor(float(self._bytes)), torch.tensor(self._seconds)
        dist.all_reduce(received, group=self._place.control)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=self._place.control)
        self._bytes, self._seconds = 0, 0.0
        return {"trace/bytes_moved": received.item(), "trace/seconds": seconds.item()}

    def _lead(self, traces: Sequence[RoutingTrace], batch: PackedBatch) -> RankRoutes:
        layout, group = self._layout, self._place.replica
        for rank, owner in enumerate(self._owners[1:], start=1):
            part = slice_routes(traces, batch.cu_seqlens, owner, tp=layout.tp, cp=layout.cp)
            for tensor in _as_bytes(part):
                dist.send(tensor, group_dst=rank, group=group)
        return slice_routes(traces, batch.cu_seqlens, self._mine, tp=layout.tp, cp=layout.cp)

    def _absent(self, batch: PackedBatch) -> RankRoutes:
        rows = batch.tokens // (self._layout.cp * self._layout.tp)
        shape = (rows, len(self._mine.layers), self._arch.experts_per_token)
        experts = torch.zeros(shape, dtype=ids_dtype(self._arch.num_experts))
        return RankRoutes(experts, torch.zeros(rows, dtype=torch.bool))

    def _follow(self, batch: PackedBatch) -> RankRoutes:
        routes = self._absent(batch)
        for tensor in _as_bytes(routes):
            dist.recv(tensor, group_src=0, group=self._place.replica)
        self._bytes += routes.bytes
        return routes


def valid_rows(batch: PackedBatch, layout: Layout, place: Place, device: torch.device) -> torch.Tensor:
    """[rows] bool: True for router rows of this rank that are tokens, False for padding."""
    rows = rank_rows(batch.cu_seqlens, cp=layout.cp, cp_rank=place.cp, tp=layout.tp, tp_rank=place.tp)
    return torch.as_tensor(batch.valid[rows], device=device)


def reduce_stats(stats: RoutingStats, place: Place) -> RoutingStats:
    """Sums over all ranks; each has its own rows and layers, also under sequence parallelism. Collective."""
    for layers in stats.differing():
        dist.all_reduce(layers, group=parallel_state.get_pipeline_model_parallel_group())
    if place.pp == 0:
        stats.count_tokens()
    for sums in stats.sums():
        everyone = sums.cpu()
        dist.all_reduce(everyone, group=place.control)
        sums.copy_(everyone)
    if stats.rank_load.shape[-1] > 1:
        # These ranks dispatch their tokens to each other's experts.
        dist.all_reduce(stats.rank_load, group=parallel_state.get_expert_tensor_and_model_parallel_group())
        peaks = peak_over_mean(stats.rank_load).amax(0).cpu()
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=place.control)
        stats.peaks.copy_(peaks)
    return stats


def _as_bytes(routes: RankRoutes) -> list[torch.Tensor]:
    """Byte views of the arrays to send; a stage without MoE layers has no experts."""
    return [t.view(-1).view(torch.uint8) for t in (routes.experts, routes.present) if t.numel()]
