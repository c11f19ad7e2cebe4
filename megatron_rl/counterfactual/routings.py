"""The routings that a study compares: how each of its passes chooses experts, and whose routers pi_theta has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.export import model_ranks
from megatron_rl.engine.policy import Policy
from megatron_rl.models.binding import bind
from megatron_rl.models.shards import fill
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.routing.drift import common
from megatron_rl.routing.replay import Observer, Routers, RoutingPass, Tap
from megatron_rl.routing.slicing import RankRoutes

Source = Literal["live", "old", "older", "rollout", "agreeing", "unordered"]
Owner = Literal["pi_theta", "pi_old", "graft"]


@dataclass(frozen=True)
class RoutingArm:
    """One routing. `old` and `new` say which experts the passes of pi_old and of pi_theta use."""

    meaning: str
    old: Source = "live"
    new: Source = "live"
    routers: Owner = "pi_theta"
    """Whose router weights pi_theta has."""


ROUTINGS = {
    "none": RoutingArm("live routing in both passes"),
    "r2": RoutingArm("pi_theta replays pi_old's live experts [2507.18071, section 5.3]", new="old"),
    "r3": RoutingArm("both replay the rollout's experts, in their order [2510.11370]", "rollout", "rollout"),
    "r3-unordered": RoutingArm("as r3, but experts in the order of the trainer's scores", "unordered", "unordered"),
    "r3-agreeing": RoutingArm("as r3, but only rows of a layer that agree well enough", "agreeing", "agreeing"),
    "r2-stale": RoutingArm("pi_theta replays the live experts of older weights", new="older"),
    "frozen-router": RoutingArm("live; pi_theta has pi_old's routers", routers="pi_old"),
    "grafted-router": RoutingArm("live; pi_theta has a third model's routers", routers="graft"),
    "r3-weights": RoutingArm("as r3, with the rollout's gate weights", "rollout", "rollout"),
}
"""By name, in the order of tables."""


def unavailable(name: str, *, experts: int, without_traces: int, older: bool, graft: bool) -> str:
    """Returns why a routing cannot be evaluated on this batch; "" if it can."""
    arm = ROUTINGS[name]
    if name == "none":
        return ""
    if not experts:
        return "the model has no experts"
    if name == "r3-weights":
        return "saved traces hold the ids of experts, and no gate weights"
    if {arm.old, arm.new} & {"rollout", "agreeing", "unordered"} and without_traces:
        return f"{without_traces} samples have no routing trace; sample with routing.observe_rollout or replay r3"
    if arm.new == "older" and not older:
        return "no older weights; name them with --older"
    if arm.routers == "graft" and not graft:
        return "no third model; name it with --graft"
    return ""


class UnorderedPass(RoutingPass):
    """Replays the experts of the routes in the order of the pass's own scores: only the set is replayed."""

    def route(self, tap: Tap, scores: Tensor, live_scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        chosen, used = super().route(tap, scores, live_scores, live)
        order = chosen.detach().argsort(dim=1, descending=True, stable=True)
        return chosen.gather(1, order), used.gather(1, order)


def make_pass(
    policy: Policy,
    source: Source,
    mini_batch: MiniBatch,
    recorded: Sequence[Tensor],
    *,
    agree: int,
    record: bool = False,
    observers: Sequence[Observer] = (),
) -> RoutingPass:
    """Makes the routing of one pass over a mini-batch.

    `recorded`, [rows, own layers, top_k] for each micro-batch, are the experts of `old` and `older`. `agree`: how many
    of a row's experts must be among the pass's own live choice, for the source `agreeing`.
    """
    routers: Routers = policy.routers
    routes = _routes(policy, source, mini_batch, recorded)
    match source:
        case "unordered":
            return UnorderedPass(routers, routes, record=record, observers=observers)
        case "agreeing":
            return RoutingPass(
                routers,
                routes,
                record=record,
                observers=observers,
                keeps=lambda tap, routed, live: common(routed, live) >= agree,
            )
    return RoutingPass(routers, routes, record=record, observers=observers)


def _routes(
    policy: Policy, source: Source, mini_batch: MiniBatch, recorded: Sequence[Tensor]
) -> list[RankRoutes] | None:
    if source == "live" or not policy.routers.taps:  # a stage may have no routers
        return None
    if source in ("old", "older"):
        return [RankRoutes(ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)) for ids in recorded]
    assert mini_batch.routes is not None
    return [routes.to(policy.device) for routes in mini_batch.routes]


def load_routers(policy: Policy, model_dir: Path) -> None:
    """Replaces the policy's router weights by those of another model directory of the same architecture."""
    ranks = model_ranks(policy.layout, policy.place.rank)
    files = TensorFiles(model_dir)
    for slot in bind(list(policy.models), policy.arch, ranks, policy.layers.weight_names):
        if slot.weight.kind == "router":
            fill(slot.weight, slot.of(slot.parameter.data), files.read, *ranks.share(slot.weight))
