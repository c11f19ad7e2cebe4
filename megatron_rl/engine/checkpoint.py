"""Resumable checkpoints: each rank writes the shards it owns, and the manifest is written last.

A checkpoint directory is complete exactly when manifest.json is in it. Optimizer shards belong to one layout: resuming
under another is refused (start a new run from the exported Hugging Face weights instead).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rl.engine.exchange import all_gather_bytes
from megatron_rl.engine.network import Network
from megatron_rl.engine.optimizer import optimizer_parts
from megatron_rl.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged or of another layout."""


def save_checkpoint(directory: Path, networks: Mapping[str, Network], state: dict[str, Any]) -> None:
    """Writes `directory`, with the run's `state` (JSON) beside every rank's shards of each named network. Collective.

    All files go into a directory of another name, which is renamed when complete; a crash leaves that one behind and
    nothing else.
    """
    place = networks["policy"].place
    partial = directory.with_name(directory.name + ".partial")
    if place.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=place.control)
    name = f"rank-{place.rank:05d}.pt"
    torch.save(_rank_state(networks), partial / name)
    digest = _digest(partial / name)
    entry = {"name": name, "bytes": (partial / name).stat().st_size, "sha256": digest}
    files = [orjson.loads(e) for e in all_gather_bytes(orjson.dumps(entry), place.control)]
    if place.rank == 0:
        manifest = {"format": FORMAT, "layout": _layout(networks), "files": files, "state": state}
        temporary = partial / (MANIFEST + ".partial")
        temporary.write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        os.replace(temporary, partial / MANIFEST)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    dist.barrier(group=place.control)


def load_checkpoint(directory: Path, networks: Mapping[str, Network]) -> dict[str, Any]:
    """Restores weights, optimizer, learning rate and random state; returns the run's `state`. Collective."""
    manifest = read_manifest(directory)
    if manifest["layout"] != _layout(networks):
        raise CheckpointError(
            f"{directory}: written under {manifest['layout']}, resumed under {_layout(networks)}; optimizer shards "
            "belong to one layout. Resume with the same one, or start a new run from the exported weights"
        )
    policy = networks["policy"]
    entry = manifest["files"][policy.place.rank]
    path = directory / entry["name"]
    if not path.is_file() or path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
        raise CheckpointError(
            f"{path}: missing or not what its manifest says; delete {directory} to resume from the one before"
        )
    # On the CPU: each network copies what it needs to its device, and a GPU's random state is kept in host memory.
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, network in networks.items():
        _restore(network, saved["networks"][name])
    torch.set_rng_state(saved["rng"]["torch"])
    get_cuda_rng_tracker().set_states(saved["rng"]["megatron"])
    return manifest["state"]


def _restore(network: Network, saved: dict[str, Any]) -> None:
    for optimizer, part in zip(optimizer_parts(network.optimizer), saved["optimizers"], strict=True):
        if optimizer.is_stub_optimizer:
            continue
        inner = optimizer.optimizer
        for group, values in zip(inner.param_groups, part["main_params"], strict=True):
            for param, value in zip(group["params"], values, strict=True):
                param.data.copy_(value)
        inner.load_state_dict(part["inner"])
        optimizer._copy_main_params_to_model_params()
    for stage in network.stages:
        stage.start_param_sync(force_sync=True)
    network.scheduler.load_state_dict(saved["scheduler"])
    network.skipped = saved["skipped"]


def read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {MANIFEST}, so this checkpoint was never completed")
    manifest = orjson.loads(path.read_bytes())
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    return sorted(path.parent for path in root.glob(f"step-*/{MANIFEST}") if path.parent.suffix != ".partial")


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints. Only rank 0 calls it."""
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def _rank_state(networks: Mapping[str, Network]) -> dict[str, Any]:
    return {
        "networks": {name: _network_state(network) for name, network in networks.items()},
        "rng": {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()},
    }


def _network_state(network: Network) -> dict[str, Any]:
    return {
        "optimizers": [
            {}
            if part.is_stub_optimizer
            else {
                # The distributed optimizer's fp32 shards, disjoint over data parallelism, hold all weights.
                "main_params": [[p.data for p in group["params"]] for group in part.optimizer.param_groups],
                "inner": part.optimizer.state_dict(),
            }
            for part in optimizer_parts(network.optimizer)
        ],
        "scheduler": network.scheduler.state_dict(),
        "skipped": network.skipped,
    }


def _layout(networks: Mapping[str, Network]) -> dict[str, Any]:
    policy = networks["policy"]
    layout = policy.layout
    degrees = {k: getattr(layout, k) for k in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    return {**degrees, "dtype": policy.engine.dtype}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
