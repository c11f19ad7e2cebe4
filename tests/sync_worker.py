"""Pushes a model to a server from ranks under a layout: torchrun ... sync_worker.py MODEL URL LAYOUT ROUTE MUTATION."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, WeightsConfig
from megatron_rl.engine.device import use_device

Buckets = Iterator[list[tuple[str, object]]]
SWAPPED = ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight")


def mutated(buckets: Buckets, mutation: str) -> Buckets:
    for number, bucket in enumerate(buckets):
        names = dict((SWAPPED, SWAPPED[::-1])) if mutation == "swap" else {}
        bucket = [(names.get(name, name), tensor) for name, tensor in bucket]
        yield [] if mutation == "skip" and number == 2 else bucket


def main(model: str, url: str, layout_text: str, route: str, mutation: str) -> None:
    device = use_device("cpu")
    from megatron_rl.engine.parallel import start_process_groups, stop_process_groups
    from megatron_rl.engine.policy import Policy
    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.sync import WeightSync

    layout = Layout.resolve(*parse_layout(layout_text))
    place = start_process_groups(layout, device, seed=0)
    policy = Policy(Path(model), layout, place, EngineConfig(dtype="fp32"), device, optim=None)
    # Buckets far smaller than a configuration would allow, so that there are many.
    export = policy.export
    policy.export = lambda _, **options: mutated(export(60_000, **options), mutation)  # type: ignore[method-assign]
    leader = None
    if place.rank == 0:
        leader = Leader([url], api_key=None, deadline=60.0)
    config = WeightsConfig(route=route, verify=1)  # type: ignore[arg-type]
    sync = WeightSync(config, policy, leader, Path(model).parent / f"sync-{route}")
    try:
        report = sync.push(7)
        if place.rank == 0:
            print("REPORT", report["weights/probe_max_abs_diff"], flush=True)
    finally:
        sync.close()
        if leader is not None:
            leader.close()
    stop_process_groups()


if __name__ == "__main__":
    main(*sys.argv[1:])
