"""Resumable checkpoints: each rank writes what its optimizer holds, and the manifest is written last
(engine/manifest.py). A resume under another layout puts the weights together anew (engine/fragments.py).
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
    shard_name,
    strangers,
)
from megatron_rl.engine.network import Network
from megatron_rl.engine.network_state import network_state, network_tensors, restore_network
from megatron_rl.engine.shard_file import ShardReader, write_tensors
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together

PARTIAL = ".partial"
RANDOM = "random"
"""Where a rank's file has its random state."""


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
    path = partial / shard_name(place.rank)
    failure = _failure(lambda: file.update(_write_shard(path, networks)), path)
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


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(root: Path, networks: Mapping[str, Network], identity: Identity | None) -> Found:
    """Returns the newest checkpoint whose every file is whole, each rank having read its own; changes nothing.
    `identity` is needed on rank 0, whose view of the directory counts. Collective.

    Damaged and incomplete checkpoints are passed over. Raises CheckpointError, on every rank, if the newest whole one
    is of another run, model, data or dtype.
    """
    place = networks["policy"].place
    leads, world = place.rank == 0, dist.get_world_size(place.control)
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
            # Another world may have written it: each rank reads its part of the files.
            mine = next(filter(None, (_check_shard(directory, f) for f in manifest.files[place.rank :: world])), "")
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


def _check_shard(directory: Path, entry: ShardFile) -> str:
    """Returns what is wrong with one of the checkpoint's files; empty if nothing is."""
    path = directory / entry.name
    try:
        whole = path.stat().st_size == entry.bytes and _digest(path) == entry.sha256
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return "" if whole else f"{path}: not what its manifest says"


def load_checkpoint(directory: Path, manifest: Manifest, networks: Mapping[str, Network]) -> None:
    """Restores weights, optimizer and learning rate from what `find_checkpoint` found, and random state too if it was
    written under this layout: then the run goes on as if it had not ended, to the bit. Collective.

    Frozen weights are not in the checkpoint: the networks have loaded them. Raises an error on every rank, before
    anything is restored, if they are not those with which the checkpoint was written.
    """
    place = networks["policy"].place
    same_layout = manifest.layout == _layout(networks)
    files = [manifest.files[place.rank]] if same_layout else manifest.files
    readers = [ShardReader(directory / file.name) for file in files]
    with together(place.control):
        for name, network in networks.items():
            if same_layout and readers[0].state["networks"][name]["frozen"] != network.frozen_digest:
                raise CheckpointError(
                    f"{directory}: the {name} in {network.model_dir} has other weights of the kinds in "
                    f"{network.optim_section}.freeze than when the run began. Put back what the run began with, or "
                    "start a new run in another run_dir"
                )
    for name, network in networks.items():
        restore_network(network, name, readers)
    if same_layout:
        torch.set_rng_state(readers[0].read(f"{RANDOM}/torch"))
        tracker = get_cuda_rng_tracker()
        tracker.set_states({name: readers[0].read(f"{RANDOM}/megatron/{name}") for name in tracker.get_states()})


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


def _write_shard(path: Path, networks: Mapping[str, Network]) -> dict[str, Any]:
    tensors = {name: each for key, network in networks.items() for name, each in network_tensors(network, key).items()}
    tensors[f"{RANDOM}/torch"] = torch.get_rng_state()
    tensors |= {f"{RANDOM}/megatron/{name}": each for name, each in get_cuda_rng_tracker().get_states().items()}
    return write_tensors(path, tensors, {"networks": {key: network_state(each) for key, each in networks.items()}})


def _layout(networks: Mapping[str, Network]) -> dict[str, Any]:
    policy = networks["policy"]
    layout = policy.layout
    degrees = {k: getattr(layout, k) for k in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    # Without it the layers of each stage follow from the degrees and the model.
    given = {"stage_layers": list(layout.stage_layers)} if layout.stage_layers else {}
    # Each bucket is cut into the ranks' shards; without overlap there is one bucket.
    buckets = {"shards": "by bucket"} if policy.engine.overlap != "none" else {}
    return {**degrees, **given, **buckets, "dtype": policy.engine.dtype}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
