"""Work of the ranks in tests of the weight sync:

sync_worker.py push MODEL URL LAYOUT ROUTE MUTATION TEMPERATURE STRESS    syncs the model to the server at the URL
sync_worker.py export MODEL DIRECTORY                   writes the model into a Hugging Face directory
sync_worker.py peak MODEL URL LAYOUT                    prints bytes that a broadcast of the model holds on each rank
sync_worker.py changes MODEL URL LAYOUT DIRECTORY       syncs by weights.route delta, and changes weights between syncs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, WeightsConfig
from megatron_rl.engine.device import use_device

# Smaller than any configuration allows, so that there are many buckets.
BUCKET_BYTES = 60_000
# An eighth, which is a message, holds the largest weight.
PEAK_BUCKET_BYTES = 240_000
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


def push(model: str, url: str, layout: str, route: str, mutation: str, temperature: str, stress: str) -> None:
    import torch

    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.sync import WeightSync

    policy = policy_of(model, layout)
    before = [parameter.clone() for each in policy.models for parameter in each.parameters()]
    export = policy.export
    policy.export = lambda _, **options: mutated(export(BUCKET_BYTES, **options), mutation)
    leader = None
    if policy.place.rank == 0:
        leader = Leader([url], api_key=None, deadline=60.0)
    config = WeightsConfig.model_validate({"route": route, "stress": json.loads(stress)})
    directory = Path(model).parent / f"sync-{route}"
    sync = WeightSync(config, policy, leader, directory, temperature=float(temperature), seed=0)
    try:
        print(json.dumps(sync.push(7) | sync.verify_if_due(7)), flush=True)
        after = [parameter for each in policy.models for parameter in each.parameters()]
        assert all(map(torch.equal, before, after)), "the sync changed the trainer's weights"
    finally:
        sync.close()
        if leader is not None:
            leader.close()


def export(model: str, directory: str) -> None:
    import torch

    from megatron_rl.models.weights_io import save_weights

    tensors = (pair for bucket in policy_of(model, "tp=1").export(BUCKET_BYTES) for pair in bucket)
    save_weights(tensors, Path(directory), Path(model), 1 << 30, torch.float32)


def peak(model: str, url: str, layout: str) -> None:
    import torch
    from live_bytes import LiveBytes

    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.all_servers import AllServers
    from megatron_rl.weights.collective import CollectiveRoute

    policy = policy_of(model, layout)
    held = [tensor for each in policy.models for tensor in (*each.parameters(), *each.buffers())]
    with LiveBytes(*held) as live:
        if policy.place.rank != 0:
            for _ in policy.export(PEAK_BUCKET_BYTES, reuse=True):
                pass
        else:
            leader = Leader([url], api_key=None, deadline=60.0)
            route = CollectiveRoute(AllServers(leader.clients, leader.loop, 60.0), torch.device("cpu"))
            sent = route.push(policy.export(PEAK_BUCKET_BYTES, reuse=True), 7)
            assert sent.bytes > 2.5 * PEAK_BUCKET_BYTES
            route.close()
            leader.close()
    print(json.dumps({"rank": policy.place.rank, "peak": live.peak}), flush=True)


def change_some(tensors: Iterable[Any]) -> int:
    """Changes about a sixteenth of the elements, by their values alone; returns how many there are in all."""
    import torch

    total = 0
    for tensor in tensors:
        bits = tensor.detach().view(torch.int32)
        tensor.detach().copy_(torch.where(bits % 16 == 3, tensor * 1.5, tensor))
        total += tensor.numel()
    return total


def changes(model: str, url: str, layout: str, directory: str) -> None:
    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.sync import WeightSync

    policy = policy_of(model, layout)
    leader = Leader([url], api_key=None, deadline=60.0) if policy.place.rank == 0 else None
    config = WeightsConfig(route="delta")
    sync = WeightSync(config, policy, leader, Path(directory), temperature=1.0, seed=0)
    for version in (7, 8, 9, 10):
        if version in (8, 10):
            change_some(parameter for each in policy.models for parameter in each.parameters())
        if version == 10 and leader is not None:
            leader.loop.run(leader.clients[0].update_weight_version(3))
        report = sync.push(version) | sync.verify_if_due(version)
        if policy.place.rank == 0:
            print(json.dumps(report), flush=True)
    sync.close()
    if leader is not None:
        leader.close()


if __name__ == "__main__":
    works: dict[str, Callable[..., None]] = {"push": push, "export": export, "peak": peak, "changes": changes}
    works[sys.argv[1]](*sys.argv[2:])
    from megatron_rl.ranks.place import stop_process_groups

    stop_process_groups()
