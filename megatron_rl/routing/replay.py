"""Records and replays the experts that routers choose, through Megatron-Core's RouterReplay.

Each router of this rank gets a Tap in place of Megatron-Core's own RouterReplay object, bound by virtual stage and
global layer number. A RoutingPass is one run of the pipeline schedule. It tells every tap which rows to use, one
micro-batch after another. At its end it asserts that each router ran exactly once for each micro-batch, and once more
if the backward pass recomputes this router (engine.recompute). Outside a pass routers route live.

Only the selection is replayed. The scores are gathered at the replayed ids before they are normalised, so gradients
reach the router.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from megatron_rl.config.recompute import Recomputation
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Router
from megatron_rl.routing.slicing import RankRoutes, ids_dtype

TopK = Callable[..., tuple[Tensor, Tensor]]


class RoutingError(RuntimeError):
    """Routers and routes do not fit together. Names the layer and the micro-batch."""


class Observer(Protocol):
    """Sees each router call of the forward pass, and no call of recomputation."""

    def __call__(self, micro_batch: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor, /) -> None: ...


class Keeps(Protocol):
    """Says which rows of a layer replay: (tap, experts of the routes [R, K], live experts [R, K]) -> [R] bool."""

    def __call__(self, tap: Tap, routed: Tensor, live: Tensor, /) -> Tensor: ...


class Tap(RouterReplay):
    """The hook of one router. `column` is the position of its layer among this rank's MoE layers, by global number."""

    def __init__(
        self,
        stage: int,
        layer: int,
        column: int,
        num_experts: int,
        top_k: int,
        features: Router,
        bias: Tensor | None,
        *,
        reruns: bool = False,
    ) -> None:
        """`bias` [experts] is what `features` says that the router adds to its scores; None if it adds nothing.
        `reruns`: the backward pass runs the router again."""
        super().__init__()
        # Megatron-Core's list of all instances pairs by construction order and keeps old models alive.
        RouterReplay.global_router_replay_instances.remove(self)
        self.stage = stage
        self.layer = layer
        self.column = column
        self.num_experts = num_experts
        self.top_k = top_k
        self.features = features
        self.bias = bias
        self.reruns = reruns
        self.routing_pass: RoutingPass | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [rows, experts] -> (scores at the ids, ids), both [rows, topk], in descending order of score."""
        assert default_compute_topk is not None
        _, ids = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        ids = _by_falling_score(scores.detach(), ids)
        live = scores.gather(1, ids), ids
        return live if self.routing_pass is None else self.routing_pass.route(self, scores, *live)


def _by_falling_score(scores: Tensor, ids: Tensor) -> Tensor:
    """Sorts ids [rows, topk] by descending score; equal scores by descending id.

    Megatron-Core 0.19 leaves ids unsorted in passes without gradients. Then the first expert would differ between
    passes over the same tokens. The last bits of the probabilities would differ too, because a sum in this order
    normalises them.
    """
    ids = ids.sort(dim=1, descending=True).values
    return ids.gather(1, scores.gather(1, ids).argsort(dim=1, descending=True, stable=True))


class Routers:
    """The taps on this rank's routers."""

    def __init__(self, stages: Sequence[GPTModel], features: Router, recomputation: Recomputation) -> None:
        """Puts a tap on each router, all of which have these features. Raises UserError if a router's choice cannot be
        replaced."""
        self._features = features
        self.taps: list[Tap] = []
        for number, stage in enumerate(stages):
            # Multi-token prediction, which is outside of the decoder, has its own routers, which are not replayed.
            for position, layer in enumerate(stage.decoder.layers):
                for router in layer.modules():
                    if isinstance(router, TopKRouter):
                        self._tap(number, router, recomputation.reruns_router(position))
        self.layers = tuple(tap.layer for tap in self.taps)
        if list(self.layers) != sorted(set(self.layers)):
            raise RoutingError(f"the routers' layer numbers {self.layers} do not ascend")

    def _tap(self, stage: int, router: TopKRouter, reruns: bool) -> None:
        config = router.config
        if config.moe_router_fusion:
            raise UserError(
                "moe_router_fusion: the fused router chooses experts without asking; routing replay needs it off"
            )
        if router.routing_type == "sinkhorn" or config.moe_expert_capacity_factor is not None:
            raise UserError("routing replay knows no sinkhorn routing and no expert capacity")
        tap = Tap(
            stage,
            layer=router.layer_number - 1,
            column=len(self.taps),
            num_experts=config.num_moe_experts,
            top_k=router.topk,
            features=self._features,
            bias=router.expert_bias,
            reruns=reruns,
        )
        router.router_replay = tap
        self.taps.append(tap)


class RoutingPass:
    """One run of the schedule, in which routers route live or replay `routes`, one for each micro-batch."""

    def __init__(
        self,
        routers: Routers,
        routes: Sequence[RankRoutes] | None = None,
        *,
        record: bool = False,
        observers: Sequence[Observer] = (),
        keeps: Keeps | None = None,
    ) -> None:
        """With `record`, `live` then holds [rows, own layers, top_k] for each micro-batch: the routers' own choices. If
        nothing is replayed, routers use these choices. `keeps` restricts the replay to some rows and layers; the others
        route live. Defaults to None: all rows with a route replay."""
        self.live: list[Tensor] = []
        self._routers = routers
        self._routes = routes
        self._record = record
        self._observers = observers
        self._keeps = keeps
        self._forward: tuple[int, int] | None = None  # stage and micro-batch
        self._to_recompute: dict[
            int, deque[int]
        ] = {}  # per column, the micro-batches whose backward pass is still to run

    @contextlib.contextmanager
    def schedule(self, micro_batches: int, *, backward: bool) -> Iterator[None]:
        """Wraps one run of the schedule, with or without a backward pass.

        Raises RoutingError if a router has not run as often as it should.
        """
        if self._routes is not None and len(self._routes) != micro_batches:
            raise RoutingError(f"routes of {len(self._routes)} micro-batches for a schedule of {micro_batches}")
        taps = self._routers.taps
        self._to_recompute = {tap.column: deque() for tap in taps}
        self._ran: dict[int, list[int]] = {tap.column: [] for tap in taps}
        self._recorded: dict[int, Tensor] = {}
        for tap in taps:
            tap.routing_pass = self
        try:
            yield
        finally:
            for tap in taps:
                tap.routing_pass = None
        for tap in taps:
            ran, left = self._ran[tap.column], self._to_recompute[tap.column]
            due = [] if backward and tap.reruns else list(range(micro_batches))
            if sorted(ran) != list(range(micro_batches)) or sorted(left) != due:
                raise RoutingError(
                    f"layer {tap.layer}: its router ran for micro-batches {ran} of {micro_batches}, and "
                    f"{len(ran) - len(left)} times again in the backward pass"
                )
        self.live = [self._recorded[index] for index in range(micro_batches)] if self._recorded else []

    @contextlib.contextmanager
    def micro_batch(self, stage: int, index: int) -> Iterator[None]:
        """Wraps the forward pass of a virtual stage. A router that runs outside of it is recomputing."""
        self._forward = (stage, index)
        try:
            yield
        finally:
            self._forward = None

    def route(self, tap: Tap, scores: Tensor, live_scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        index = self._micro_batch_of(tap)
        chosen_scores, used = live_scores, live
        if self._routes is not None:
            used = self._replayed(tap, index, live)
            chosen_scores = scores.gather(1, used)
        if self._forward is not None:
            if self._record:
                self._keep(tap, index, live)
            for observe in self._observers:
                observe(index, tap, scores.detach(), live, used)
        return chosen_scores, used

    def _micro_batch_of(self, tap: Tap) -> int:
        due = self._to_recompute[tap.column]
        if self._forward is None:
            # The pipeline schedule runs a stage's backward passes in the order of its forward passes.
            if not due:
                raise RoutingError(
                    f"layer {tap.layer}: its router ran outside a forward pass with nothing to recompute"
                )
            return due.popleft()
        stage, index = self._forward
        if stage != tap.stage:
            raise RoutingError(f"layer {tap.layer} of virtual stage {tap.stage} ran in virtual stage {stage}")
        due.append(index)
        self._ran[tap.column].append(index)
        return index

    def _replayed(self, tap: Tap, index: int, live: Tensor) -> Tensor:
        """Ids of the routes; in rows without a route, the live ids."""
        assert self._routes is not None
        routes = self._routes[index]
        if routes.experts.shape != (live.shape[0], len(self._routers.taps), live.shape[1]):
            raise RoutingError(
                f"layer {tap.layer}, micro-batch {index}: routes {tuple(routes.experts.shape)} (rows, layers, top-k) "
                f"for {live.shape[0]} rows, {len(self._routers.taps)} layers, top-{live.shape[1]}"
            )
        routed, present = routes.experts[:, tap.column].to(live.dtype), routes.present
        if self._keeps is not None:
            present = present & self._keeps(tap, routed, live)
        return torch.where(present[:, None], routed, live)

    def _keep(self, tap: Tap, index: int, live: Tensor) -> None:
        if index not in self._recorded:
            shape = (live.shape[0], len(self._routers.taps), live.shape[1])
            self._recorded[index] = live.new_empty(shape, dtype=ids_dtype(tap.num_experts))
        self._recorded[index][:, tap.column] = live
