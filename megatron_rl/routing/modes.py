"""The three routing modes of a run (live routing, R2 and R3) and their metrics. One object serves one mini-batch.

In every update R2 replays the choices of the trainer's own old-log-prob pass [GSPO 2507.18071, section 5.3]. R3 replays
the choices of the rollout engine, in the old-log-prob pass and in every update [2510.11370].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.config.schema import RoutingConfig
from megatron_rl.routing.drift import OLD_POLICY, RERUN, ROLLOUT_OLD, RoutingStats
from megatron_rl.routing.replay import Observer, Routers, RoutingPass, Tap
from megatron_rl.routing.scores import router_scores
from megatron_rl.routing.shift import RouterShift
from megatron_rl.routing.slicing import RankRoutes


class MiniBatchRouting:
    """Routing of one mini-batch on this rank: the passes of pi_old and of the update, and their metrics."""

    def __init__(
        self,
        config: RoutingConfig,
        routers: Routers,
        rollout: Sequence[RankRoutes] | None,
        valid: Sequence[Tensor],
        stats: RoutingStats,
        shift: RouterShift | None = None,
    ) -> None:
        """`rollout` are the rollout engine's routes, one for each micro-batch. `valid`, [rows] bool each, is False on
        padding. `shift` is None if the objective does not use it."""
        self.stats = stats
        self.shift = shift
        self._config = config
        self._routers = routers
        self._rollout = rollout
        self._valid = valid
        self._old: RoutingPass | None = None

    def old_pass(self) -> RoutingPass:
        """Routing of the pass that computes pi_old's log-probs."""
        observers = [] if self._rollout is None else [self._against_rollout()]
        if self.shift is not None:
            observers.append(self.shift.keep)
        self._old = RoutingPass(self._routers, self._of_rollout(), record=True, observers=observers)
        return self._old

    def rerun_pass(self) -> RoutingPass:
        """Routing of a second pass of pi_old, which should choose the same experts."""
        return RoutingPass(self._routers, self._of_rollout(), observers=[self._against_first()])

    def shift_pass(self, shift: RouterShift) -> RoutingPass:
        """Routing of a forward pass with the weights and the routes of the next update; it completes `shift`."""
        return RoutingPass(self._routers, self._routes(), observers=[shift.compare])

    def update_pass(self) -> RoutingPass:
        """Routing of the forward and backward passes of the update."""
        routes = self._routes()
        observers: list[Observer] = [self._router(routes)]
        if self._old is not None:
            observers.append(self._against_old(self._old))
        elif self._rollout is not None:
            observers.append(self._against_rollout())  # there is one mini-batch, so pi_theta is pi_old
        return RoutingPass(self._routers, routes, observers=observers)

    def _of_rollout(self) -> Sequence[RankRoutes] | None:
        return self._rollout if self._config.replay == "r3" else None

    def _routes(self) -> Sequence[RankRoutes] | None:
        """Routes that the update replays; None if it routes live."""
        if self._config.replay != "r2":
            return self._of_rollout()
        if not self._routers.taps:  # a stage without experts
            return None
        assert self._old is not None
        return [RankRoutes(ids, torch.ones_like(valid)) for ids, valid in zip(self._old.live, self._valid, strict=True)]

    def _router(self, routes: Sequence[RankRoutes] | None) -> Observer:
        def observe(index: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
            replayed = None if routes is None else routes[index].present
            said = router_scores(tap, scores)
            self.stats.observe_router(index, tap.layer, said, used, live, replayed, self._valid[index])

        return observe

    def _against_rollout(self) -> Observer:
        assert self._rollout is not None
        rollout = self._rollout
        self._expect(ROLLOUT_OLD, self._routed(rollout))

        def observe(index: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
            experts = rollout[index].experts[:, tap.column]
            self._compare(ROLLOUT_OLD, index, tap.layer, (experts, used), (experts, live))

        return observe

    def _against_old(self, old: RoutingPass) -> Observer:
        # Rows without a route are counted as fallback; here they would hide the effect of the replay.
        routes = self._of_rollout()
        self._expect(OLD_POLICY, self._valid if routes is None else self._routed(routes))

        def observe(index: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
            was_live = old.live[index][:, tap.column]
            was_used = was_live if routes is None else routes[index].experts[:, tap.column]
            self._compare(OLD_POLICY, index, tap.layer, (was_used, used), (was_live, live))

        return observe

    def _against_first(self) -> Observer:
        assert self._old is not None
        first = self._old.live
        for index, valid in enumerate(self._valid):
            self.stats.expect(RERUN, index, valid)

        def observe(index: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
            self.stats.compare([RERUN], index, tap.layer, first[index][:, tap.column], live)

        return observe

    def _compare(
        self, pair: str, index: int, layer: int, used: tuple[Tensor, Tensor], live: tuple[Tensor, Tensor]
    ) -> None:
        """Compares the choices that were used, and those of the routers. Without a replay they are the same tensors."""
        if used[0] is live[0] and used[1] is live[1]:
            return self.stats.compare([f"{pair}/effective", f"{pair}/live"], index, layer, *live)
        self.stats.compare([f"{pair}/effective"], index, layer, *used)
        self.stats.compare([f"{pair}/live"], index, layer, *live)

    def _routed(self, routes: Sequence[RankRoutes]) -> list[Tensor]:
        return [valid & each.present for valid, each in zip(self._valid, routes, strict=True)]

    def _expect(self, pair: str, valid: Sequence[Tensor]) -> None:
        for index, rows in enumerate(valid):
            for kind in ("effective", "live"):
                self.stats.expect(f"{pair}/{kind}", index, rows)
