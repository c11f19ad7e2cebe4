"""Negative cases: each spoils the replay in one way that has happened in practice, and must be caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rl.certify.samples import trace_of
from megatron_rl.data.sample import Sample
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.engine.policy import Policy
from megatron_rl.errors import UserError
from megatron_rl.routing.replay import Routers, RoutingPass, Tap
from megatron_rl.routing.slicing import RankRoutes

Samples = list[Sample]


@dataclass(frozen=True)
class Spoiled:
    """A change of the leaders' samples, of this rank's routes, or of the pass."""

    samples: Callable[[Samples], Samples] = lambda samples: samples
    routes: Callable[[RankRoutes], RankRoutes] = lambda routes: routes
    routing_pass: type[RoutingPass] = RoutingPass
    backward: bool = False  # visible in the backward pass only


class LiveBackward(RoutingPass):
    """Replays in the forward pass, but not when activations are recomputed."""

    def route(self, tap: Tap, scores: Tensor, live_scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        recomputing = self._forward is None
        replayed = super().route(tap, scores, live_scores, live)
        return (live_scores, live) if recomputing else replayed


def cases(policy: Policy) -> dict[str, Spoiled]:
    """The negative cases that the layout and the engine can show, by name."""
    found = {
        "shifted by one row": Spoiled(samples=lambda s: _with_traces(s, [_shifted(trace_of(x)) for x in s])),
        "two layers swapped": Spoiled(samples=lambda s: _with_traces(s, [_swapped(trace_of(x)) for x in s])),
        "another sample's trace": Spoiled(samples=_exchanged),
    }
    if policy.layout.cp > 1:
        found["CP halves swapped"] = Spoiled(routes=_halves_swapped)
    if policy.layout.tp > 1:
        found["SP slices swapped"] = Spoiled(routes=_halves_swapped)
    if policy.engine.recomputation.rerun_routers(policy.layout, policy.arch):
        found["backward without replay"] = Spoiled(routing_pass=LiveBackward, backward=True)
    return found


def _with_traces(samples: Samples, traces: Sequence[RoutingTrace]) -> Samples:
    pairs = zip(samples, traces, strict=True)
    return [replace(sample, trace=trace) for sample, trace in pairs]


def _shifted(trace: RoutingTrace) -> RoutingTrace:
    experts, present = np.roll(trace.experts, 1, axis=0), np.roll(trace.present, 1)
    return replace(trace, experts=experts, present=present)


def _swapped(trace: RoutingTrace) -> RoutingTrace:
    order = np.arange(len(trace.layers))
    order[[0, -1]] = order[[-1, 0]]
    return replace(trace, experts=trace.experts[:, order])


def _exchanged(samples: Samples) -> Samples:
    """Exchanges the traces of two samples of equal length."""
    lengths = [len(s.token_ids) for s in samples]
    first = next(i for i, n in enumerate(lengths) if n in lengths[i + 1 :])
    second = lengths.index(lengths[first], first + 1)
    traces = [trace_of(s) for s in samples]
    traces[first], traces[second] = traces[second], traces[first]
    return _with_traces(samples, traces)


def _halves_swapped(routes: RankRoutes) -> RankRoutes:
    order = torch.arange(len(routes.present)).roll(len(routes.present) // 2)
    return RankRoutes(routes.experts[order], routes.present[order])


def refuses_fusion(policy: Policy) -> bool:
    """Whether the fused router, which cannot replay, is refused before it runs."""
    stages = policy.models
    config = stages[0].config
    config.moe_router_fusion = True
    try:
        Routers(stages, policy.arch.router, policy.engine.recomputation)
    except UserError:
        return True
    finally:
        config.moe_router_fusion = False
    return not policy.routers.taps  # a stage without routers has nothing to refuse
