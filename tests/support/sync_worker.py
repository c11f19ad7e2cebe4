"""Work of the ranks in tests of the weight sync:

sync_worker.py push MODEL URL LAYOUT ROUTE MUTATION TEMPERATURE STRESS    syncs the model to the server at the URL
sync_worker.py export MODEL DIRECTORY                   writes the model into a Hugging Face directory
"""

from __future__ import annotations

import json
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


if __name__ == "__main__":
    if sys.argv[1] == "push":
        push(*sys.argv[2:])
    else:
        export(*sys.argv[2:])
    from megatron_rl.ranks.place import stop_process_groups

    stop_process_groups()
