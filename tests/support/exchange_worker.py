"""Distributes samples whose numbers have gaps, as after lost verdicts, and returns the routes that each rank got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routing_worker import drifted_samples

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.engine.device import use_device

NUMBERS = (3, 4, 9, 11)


def distributed(model: Path, text: str) -> list[dict[str, Any]]:
    """Returns token ids and routes of this rank's micro-batches."""
    device = use_device("cpu")

    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.models.architecture import read_architecture
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups
    from megatron_rl.routing.exchange import RouteExchange

    layout = Layout.resolve(*parse_layout(text))
    place = start_process_groups(layout, device, seed=0)
    arch = read_architecture(model)
    samples = drifted_samples(arch.vocab_size, arch.moe_layers, arch.num_experts, arch.experts_per_token)
    # The last leader has all of them, so half of them must move.
    mine = (
        [TrainSample(i, i, s, 1.0) for i, s in zip(NUMBERS, samples, strict=True)] if place.dp == layout.dp - 1 else []
    )
    exchange = RouteExchange(arch, arch.moe_layers, place, layout)
    (batch,) = distribute(mine, place, layout, mini_batches=1, max_tokens=32, routes=exchange)
    assert batch.routes is not None
    stop_process_groups(leave_world=False)
    return [
        {
            "tokens": packed.token_ids,
            "cu_seqlens": packed.cu_seqlens,
            "experts": r.experts.numpy(),
            "present": r.present.numpy(),
        }
        for packed, r in zip(batch.micro_batches, batch.routes, strict=True)
        if not packed.is_empty
    ]
