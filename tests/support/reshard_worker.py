"""Checkpoints written under one layout and read under another: what every optimizer holds comes back to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.engine.manifest import Identity, ModelIdentity, State, read_manifest
from megatron_rl.models.identity import file_digests

IDENTITY = Identity(run="0" * 32, models={}, data={})


def main(
    model: Path, root: Path, first: str, others: list[str], dtype: str, optim: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint under `first`, then reads it under each other layout, writes it there, and reads that under
    `first` again."""
    network = build(model, first, dtype, optim=optim)
    train(network)
    torch.rand(3)  # so that the random state is not that of a start
    save(root / "first", network, model)
    expected = held(network)
    assert any(name.startswith("policy/exp_avg_sq/") and tensor.any() for name, tensor in expected.items())
    exported, random = whole(network), torch.get_rng_state()
    if network.place.rank == 0:
        check(exported, read_export(root, model, optim or {}), "export")
    network = build(model, first, dtype, optim=optim)
    load(root / "first", network)
    check(expected, held(network), first)
    assert torch.equal(torch.get_rng_state(), random)
    for other in others:
        network = build(model, other, dtype, optim=optim)
        load(root / "first", network)
        check(exported, whole(network), f"{first} -> {other}")
        assert network.skipped == 7
        save(root / other, network)
        network = build(model, first, dtype, optim=optim)
        load(root / other, network)
        check(expected, held(network), f"{first} -> {other} -> {first}")
        train(network)  # what was restored can be trained


def other_buckets(model: Path, root: Path) -> None:
    """Does the same where buckets, by which shards are cut, change with engine.overlap and not the layout."""
    from megatron_rl.engine import network as network_module
    from megatron_rl.engine.data_parallel import ddp_config

    def small(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(ddp_config(*args, **kwargs), bucket_size=1000)

    with mock.patch.object(network_module, "ddp_config", small):  # without overlap there is one bucket all the same
        network = build(model, "dp=2", "bf16")
        train(network)
        save(root / "all", network)
        expected, exported = held(network), whole(network)
        network = build(model, "dp=2", "bf16", "none")
        load(root / "all", network)
        assert held(network).keys() != expected.keys()
        check(exported, whole(network), "all -> none")
        save(root / "none", network)
        network = build(model, "dp=2", "bf16")
        load(root / "none", network)
        check(expected, held(network), "all -> none -> all")


def build(  # type: ignore[no-untyped-def]
    model: Path, text: str, dtype: str, overlap: str = "all", optim: dict[str, Any] | None = None
):
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    stop_process_groups(leave_world=False)
    layout = Layout.resolve(*parse_layout(text))
    place = start_process_groups(layout, torch.device("cpu"), seed=0)
    engine = EngineConfig(device="cpu", dtype=dtype, overlap=overlap)  # type: ignore[arg-type]
    config = OptimConfig(**{"lr": 0.1, "weight_decay": 0.1, **(optim or {})})
    return Policy(model, layout, place, engine, torch.device("cpu"), config)


def train(network) -> None:  # type: ignore[no-untyped-def]
    """Two steps with gradients that are drawn: equal on copies of a weight, and unlike anywhere else."""
    from megatron_rl.engine.export import model_ranks
    from megatron_rl.models.binding import bind

    slots = bind(
        list(network.models), network.arch, model_ranks(network.layout, network.place.rank), network.layers.weight_names
    )
    ranks = model_ranks(network.layout, network.place.rank)
    for step in (1, 2):
        network.optimizer.zero_grad()
        for slot in slots:
            if not isinstance(slot.parameter, torch.nn.Parameter):
                continue
            share = ranks.share(slot.weight)[0] if slot.weight.sharding.split else 0
            seed = [*map(ord, slot.weight.sources[0].name), share, step]
            drawn = np.random.default_rng(seed).normal(size=tuple(slot.of(slot.parameter).shape))
            if slot.weight.sharding.padded:  # rows that no token has never get a gradient
                drawn[sum(piece.length for piece in slot.weight.cut(*ranks.share(slot.weight))[1]) :] = 0
            gradient = slot.of(slot.parameter.main_grad)  # type: ignore[attr-defined]
            gradient.copy_(torch.from_numpy(drawn))
        for stage in network.stages:
            for buffer in (*stage.buffers, *stage.expert_parallel_buffers):
                buffer.grad_data /= buffer.data_parallel_group.size()  # which sums them
            stage.start_grad_sync()
            stage.finish_grad_sync()
        network.scheduler.step(increment=1)
        network.optimizer.prepare_grads()
        network.optimizer.step()
    network.skipped = 7


def read_export(root: Path, model: Path, optim: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what `megatron-rl export` makes of the first checkpoint."""
    from safetensors.torch import load_file

    from megatron_rl.engine.named_checkpoint import CheckpointName
    from megatron_rl.engine.saved_model import export_checkpoint

    run = root / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(root / "first")
    config = {"model": {"path": str(model)}, "optim": {"freeze": [], **optim}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export_checkpoint(CheckpointName(run, None), root / "exported")
    (file,) = (root / "exported").glob("*.safetensors")
    return load_file(file)


def save(root: Path, network, model: Path | None = None) -> None:  # type: ignore[no-untyped-def]
    from megatron_rl.engine.checkpoint import describe, held_by_rank
    from megatron_rl.engine.checkpoint_writer import CheckpointWriter

    networks, place = {"policy": network}, network.place
    models = {} if model is None else {"policy": ModelIdentity(key="", architecture={}, files=file_digests(model))}
    identity = IDENTITY.model_copy(update={"models": models})
    manifest = describe(networks, identity, State(step=1, cursor={})) if place.rank == 0 else None
    writer = CheckpointWriter(root, place.control, keep=1)
    writer.start(1, *held_by_rank(networks), manifest)
    writer.wait()


def load(root: Path, network) -> None:  # type: ignore[no-untyped-def]
    from megatron_rl.engine.checkpoint import load_checkpoint

    directory = root / "step-000001"
    load_checkpoint(directory, read_manifest(directory), {"policy": network})


def held(network) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    from megatron_rl.engine.network_state import network_tensors

    return {name: tensor.clone() for name, tensor in network_tensors(network, "policy").items()}


def whole(network) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    return {name: tensor.clone() for bucket in network.export(1 << 28) for name, tensor in bucket}


def check(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], how: str) -> None:
    assert found.keys() == expected.keys(), how
    unequal = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not unequal, (how, unequal[:5])
