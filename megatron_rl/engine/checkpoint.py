"""Resumable checkpoints: each rank writes the shards it owns, and the manifest is written last (engine/manifest.py).

Optimizer shards belong to one layout: resuming under another is refused (start a new run from the exported Hugging Face
weights instead).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rl.disk import DiskError, explain, size, sync_directory
from megatron_rl.engine.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    DamagedError,
    Identity,
    Manifest,
    ShardFile,
    State,
    check_identity,
    checkpoint_name,
    checkpoints,
    read_manifest,
    strangers,
)
from megatron_rl.engine.network import Network
from megatron_rl.engine.optimizer import optimizer_parts
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together

PARTIAL = ".partial"


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from, and the newer ones that are damaged. The same on every rank."""

    directory: Path | None  # None: there is none
    manifest: Manifest | None
    damaged: tuple[Path, ...]
    warnings: tuple[str, ...]


def save_checkpoint(root: Path, networks: Mapping[str, Network], identity: Identity | None, state: State) -> None:
    """Writes the checkpoint of `state.step` under `root`: every rank's shards of each named network, and the run's
    state. `identity` is needed on rank 0. Collective.

    All files go into a directory of another name, and are on the disk before it is renamed; a crash leaves that one
    behind and nothing else. Raises DiskError, on every rank, if any could not write; older checkpoints then stay.
    """
    place = networks["policy"].place
    directory = root / checkpoint_name(state.step)
    partial = root / (directory.name + PARTIAL)
    files: list[ShardFile] = []

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        assert identity is not None
        manifest = Manifest(format=FORMAT, layout=_layout(networks), identity=identity, files=files, state=state)
        _write(partial / MANIFEST, manifest.to_bytes())
        sync_directory(partial)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
        sync_directory(root)

    leads = place.rank == 0
    _all_wrote(_failure(prepare, partial) if leads else "", root, directory, place.control)
    file: dict[str, Any] = {}
    path = partial / f"rank-{place.rank:05d}.pt"
    failure = _failure(lambda: file.update(_write_shard(path, _rank_state(networks))), path)
    _all_wrote(failure, root, directory, place.control)
    files += [ShardFile(**orjson.loads(part)) for part in all_gather_bytes(orjson.dumps(file), place.control)]
    _all_wrote(_failure(finish, partial / MANIFEST) if leads else "", root, directory, place.control)


def _failure(write: Callable[[], None], path: Path) -> str:
    try:
        write()
    except OSError as error:
        return explain(error, path)
    return ""


def _all_wrote(failure: str, root: Path, directory: Path, control: dist.ProcessGroup) -> None:
    """Raises DiskError on every rank if one of them has a failure. Collective."""
    failures = [part.decode() for part in all_gather_bytes(failure.encode(), control) if part]
    if not failures:
        return
    text = ""
    if dist.get_rank(control) == 0:
        shutil.rmtree(root / (directory.name + PARTIAL), ignore_errors=True)  # useless, and it takes space
        text = f"the checkpoint of {directory.name} was not written: {failures[0]}. "
        whole = checkpoints(root)
        if whole:
            needed = size(sum(file.stat().st_size for file in whole[-1].iterdir()))
            text += f"{whole[-1].name} ({needed}) is complete: free that much, and --resume goes on from it"
        else:
            text += "There is no older one"
    raise DiskError(broadcast_bytes(text.encode(), control).decode())


class _Digesting:
    """A file for torch.save: what is written is digested on its way. The first failure is kept and not raised, which
    torch's writer would turn into an error of its own."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha = hashlib.sha256()
        self._bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._sha.update(view)
        self._bytes += len(view)
        try:
            start = 0
            while start < len(view) and self._error is None:
                start += self._file.write(view[start:]) or 0
        except OSError as error:
            self._error = error
        return len(view)

    def flush(self) -> None: ...

    def close(self) -> dict[str, Any]:
        """Returns size and digest, once all is on the disk. Raises the first OSError."""
        with self._file:
            if self._error is not None:
                raise self._error
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._sha.hexdigest()}


def _write_shard(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    file = _Digesting(path)
    torch.save(state, file)  # type: ignore[arg-type]
    return {"name": path.name, **file.close()}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(root: Path, networks: Mapping[str, Network], identity: Identity | None) -> Found:
    """Returns the newest checkpoint whose every file is whole, each rank having read its own; changes nothing.
    `identity` is needed on rank 0, whose view of the directory counts. Collective.

    Damaged and incomplete checkpoints are passed over. Raises CheckpointError, on every rank, if the newest whole one
    is of another run, model, data or layout.
    """
    place = networks["policy"].place
    leads = place.rank == 0
    names = orjson.loads(broadcast_bytes(orjson.dumps([p.name for p in checkpoints(root)]), place.control))
    warnings = [f"{p}: passed over; it is no checkpoint" for p in strangers(root, PARTIAL)] if leads else []
    damaged: list[Path] = []
    for directory in (root / name for name in reversed(names)):
        manifest = None
        answer = _judge(directory, networks, identity) if leads else {}
        answer = orjson.loads(broadcast_bytes(orjson.dumps(answer), place.control))
        if answer["refusal"]:
            raise CheckpointError(answer["refusal"])
        problem = answer["damage"]
        if not problem:
            manifest = Manifest.model_validate(answer["manifest"])
            mine = _check_shard(directory, manifest, place.rank)
            problem = next((p.decode() for p in all_gather_bytes(mine.encode(), place.control) if p), "")
        if manifest is not None and not problem:
            return Found(directory, manifest, tuple(damaged), tuple(warnings))
        warnings.append(f"{problem}; passed over, and moved to history/")
        damaged.append(directory)
    return Found(None, None, tuple(damaged), tuple(warnings))


def _judge(directory: Path, networks: Mapping[str, Network], identity: Identity | None) -> dict[str, Any]:
    """Rank 0's verdict on a manifest, for all ranks."""
    assert identity is not None
    answer: dict[str, Any] = {"refusal": "", "damage": "", "manifest": None}
    try:
        manifest = read_manifest(directory)
        check_identity(directory, manifest, _layout(networks), identity)
        answer["manifest"] = manifest.model_dump(mode="json")
    except DamagedError as error:
        answer["damage"] = str(error)
    except CheckpointError as error:
        answer["refusal"] = str(error)
    return answer


def _check_shard(directory: Path, manifest: Manifest, rank: int) -> str:
    """Returns what is wrong with this rank's file; empty if nothing is."""
    path = directory / f"rank-{rank:05d}.pt"
    entry = manifest.files[rank] if rank < len(manifest.files) else None
    try:
        whole = (
            entry is not None
            and entry.name == path.name
            and path.stat().st_size == entry.bytes
            and _digest(path) == entry.sha256
        )
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return "" if whole else f"{path}: not what its manifest says"


def load_checkpoint(directory: Path, networks: Mapping[str, Network]) -> None:
    """Restores weights, optimizer, learning rate and random state from what `find_checkpoint` found. Collective.

    Frozen weights are not in the checkpoint: the networks have loaded them. Raises an error on every rank, before
    anything is restored, if they are not those with which the checkpoint was written.
    """
    place = networks["policy"].place
    path = directory / f"rank-{place.rank:05d}.pt"
    # On the CPU: each network copies what it needs to its device, and a GPU's random state is kept in host memory.
    saved = torch.load(path, map_location="cpu", weights_only=True)
    with together(place.control):
        for name, network in networks.items():
            if saved["networks"][name].get("frozen", "") != network.frozen_digest:
                raise CheckpointError(
                    f"{directory}: the {name} in {network.model_dir} has other weights of the kinds in "
                    f"{network.optim_section}.freeze than when the run began. Put back what the run began with, or "
                    "start a new run in another run_dir"
                )
    for name, network in networks.items():
        _restore(network, saved["networks"][name])
    torch.set_rng_state(saved["rng"]["torch"])
    get_cuda_rng_tracker().set_states(saved["rng"]["megatron"])


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


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints. Only rank 0 calls it."""
    for old in checkpoints(root)[:-keep]:
        # Never a checkpoint without some of its files, should this be cut off.
        partial = old.with_name(old.name + PARTIAL)
        old.rename(partial)
        shutil.rmtree(partial)


def remove_partial(root: Path) -> None:
    """Deletes what saves that were cut off have left. Only rank 0 calls it."""
    for partial in root.glob("step-*" + PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)


def _rank_state(networks: Mapping[str, Network]) -> dict[str, Any]:
    return {
        "networks": {name: _network_state(network) for name, network in networks.items()},
        "rng": {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()},
    }


def _network_state(network: Network) -> dict[str, Any]:
    return {
        **({"frozen": network.frozen_digest} if network.frozen_digest else {}),
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
    # Without it the layers of each stage follow from the degrees and the model.
    given = {"stage_layers": list(layout.stage_layers)} if layout.stage_layers else {}
    return {**degrees, **given, "dtype": policy.engine.dtype}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
