"""Breaks the routing replay that the certificate checks."""

from __future__ import annotations

from typing import Any

from megatron_rl.engine.device import use_device


def break_replay(mutation: str) -> None:
    use_device("cpu")
    import torch

    from megatron_rl.routing import exchange
    from megatron_rl.routing.replay import RoutingPass, Tap
    from megatron_rl.routing.slicing import RankRoutes

    if mutation == "replay off":
        RoutingPass._replayed = lambda self, tap, index, live: live  # type: ignore[method-assign]
    elif mutation == "missing rows replayed":
        whole = exchange.slice_routes

        def made_up(*args: Any, **kwargs: Any) -> RankRoutes:
            found = whole(*args, **kwargs)
            found.experts[~found.present] = torch.arange(found.experts.shape[-1], dtype=found.experts.dtype)
            return RankRoutes(found.experts, torch.ones_like(found.present))

        exchange.slice_routes = made_up
    elif mutation == "micro-batches mixed up":
        plain = RoutingPass._replayed
        RoutingPass._replayed = lambda self, tap, index, live: plain(self, tap, 0, live)  # type: ignore[method-assign]
    elif mutation == "hook not called":
        Tap.get_replay_topk = lambda self, scores, topk, a=None, b=None, compute=None: compute(scores, topk)  # type: ignore[assignment,method-assign,misc]
    elif mutation != "none":
        raise ValueError(mutation)
