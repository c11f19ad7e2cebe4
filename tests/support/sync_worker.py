"""Work of the ranks in tests of the weight sync:

sync_worker.py push MODEL URL LAYOUT ROUTE MUTATION TEMPERATURE     syncs the model to the server at the URL
sync_worker.py export MODEL DIRECTORY                   writes the model into a Hugging Face directory
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, WeightsConfig
from megatron_rl.engine.device import use_device

# Smaller than any configuration allows, so that there are many buckets.
BUCKET_BYTES = 60_000
SWAPPED = ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight")

Buckets = Iterator[list[tuple[str, object]]]


def mutated(buckets: Buckets, mutation: str) -> Buckets:
    for number, bucket in enumerate(buckets):
        names = dict((SWAPPED, SWAPPED[::-1])) if mutation == "swap" else {}
        bucket = [(names.get(name, name), tensor) for name, tensor in bucket]
        yield [] if mutation == "skip" and number == 2 else bucket


def policy_of(model: str, layout_text: str):  # type: ignore[no-untyped-def]
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    device = use_device("cpu")
    layout = Layout.resolve(*parse_layout(layout_text))
    place = start_process_groups(layout, device, seed=0)
    return Policy(Path(model), layout, place, EngineConfig(dtype="fp32"), device, optim=None)


def push(model: str, url: str, layout: str, route: str, mutation: str, temperature: str) -> None:
    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.sync import WeightSync

    policy = policy_of(model, layout)
    export = policy.export
    policy.export = lambda _, **options: mutated(export(BUCKET_BYTES, **options), mutation)
    leader = None
    if policy.place.rank == 0:
        leader = Leader([url], api_key=None, deadline=60.0)
    config = WeightsConfig(route=route)  # type: ignore[arg-type]
    sync = WeightSync(config, policy, leader, Path(model).parent / f"sync-{route}", temperature=float(temperature))
    try:
        report = sync.push(7)
        if policy.place.rank == 0:
            print("REPORT", report["weights/probe_max_abs_diff"], flush=True)
    finally:
        sync.close()
        if leader is not None:
            leader.close()


def export(model: str, directory: str) -> None:
    import torch

    from megatron_rl.models.weights_io import save_weights

    tensors = (pair for bucket in policy_of(model, "tp=1").export(BUCKET_BYTES) for pair in bucket)
    save_weights(tensors, Path(directory), Path(model), 1 << 30, torch.float32)


if __name__ == "__main__":
    if sys.argv[1] == "push":
        push(*sys.argv[2:])
    else:
        export(*sys.argv[2:])
    from megatron_rl.ranks.place import stop_process_groups

    stop_process_groups()
