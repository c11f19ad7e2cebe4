"""What a checkpoint has of the networks, and how a run finds and loads the one that it goes on from.
engine/checkpoint_writer.py writes them.

Each rank's file has what its optimizers held (engine/shard_file.py). A resume under another layout puts the weights
together anew (engine/fragments.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_rl.engine.manifest import (
    FORMAT,
    CheckpointError,
    DamagedError,
    Identity,
    Manifest,
    State,
    check_identity,
    checkpoints,
    first_damage,
    read_manifest,
    strangers,
)
from megatron_rl.engine.network import Network
from megatron_rl.engine.network_state import network_state, network_tensors, restore_network
from megatron_rl.engine.shard_file import ShardReader
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together

RANDOM = "random"
"""Where a rank's file has its random state."""


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from, and the newer ones that are damaged. The same on every rank."""

    directory: Path | None  # None: there is none
    manifest: Manifest | None
    damaged: tuple[Path, ...]
    warnings: tuple[str, ...]


def find_checkpoint(root: Path, networks: Mapping[str, Network], identity: Identity | None) -> Found:
    """Returns the newest checkpoint whose every file is whole, each rank having read its own; changes nothing.
    `identity` is needed on rank 0, whose view of the directory counts. Collective.

    Damaged and incomplete checkpoints are passed over. Raises CheckpointError, on every rank, if the newest whole one
    is of another run, model, data or dtype.
    """
    place = networks["policy"].place
    leads = place.rank == 0
    names = orjson.loads(broadcast_bytes(orjson.dumps([p.name for p in checkpoints(root)]), place.control))
    warnings = [f"{p}: passed over; it is no checkpoint" for p in strangers(root)] if leads else []
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
            problem = check_files(directory, manifest, place.control)
        if manifest is not None and not problem:
            return Found(directory, manifest, tuple(damaged), tuple(warnings))
        warnings.append(f"{problem}; passed over")
        damaged.append(directory)
    return Found(None, None, tuple(damaged), tuple(warnings))


def _judge(directory: Path, networks: Mapping[str, Network], identity: Identity | None) -> dict[str, Any]:
    """Rank 0's verdict on a manifest, for all ranks."""
    assert identity is not None
    answer: dict[str, Any] = {"refusal": "", "damage": "", "manifest": None}
    try:
        manifest = read_manifest(directory)
        check_identity(directory, manifest, layout_record(networks), identity)
        answer["manifest"] = manifest.model_dump(mode="json")
    except DamagedError as error:
        answer["damage"] = str(error)
    except CheckpointError as error:
        answer["refusal"] = str(error)
    return answer


def check_files(directory: Path, manifest: Manifest, control: dist.ProcessGroup) -> str:
    """Returns what is wrong with a file of the checkpoint; empty if nothing is. Another world may have written it: each
    rank reads its part of the files. Collective."""
    mine = first_damage(directory, manifest.files[control.rank() :: control.size()])
    return next((part.decode() for part in all_gather_bytes(mine.encode(), control) if part), "")


def load_checkpoint(
    directory: Path, manifest: Manifest, networks: Mapping[str, Network], *, without_moments: Collection[str] = ()
) -> None:
    """Restores weights, optimizer and learning rate from a checkpoint whose files are whole, and random state too if it
    was written under this layout: then the run goes on as if it had not ended, to the bit. The optimizers of the
    networks `without_moments` begin anew. Collective.

    Frozen weights are not in the checkpoint: the networks have loaded them. Raises an error on every rank, before
    anything is restored, if they are not those with which the checkpoint was written.
    """
    place = networks["policy"].place
    same_layout = manifest.layout == layout_record(networks)
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
        restore_network(network, name, readers, moments=name not in without_moments)
    if same_layout:
        torch.set_rng_state(readers[0].read(f"{RANDOM}/torch"))
        tracker = get_cuda_rng_tracker()
        tracker.set_states({name: readers[0].read(f"{RANDOM}/megatron/{name}") for name in tracker.get_states()})


def describe(networks: Mapping[str, Network], identity: Identity, state: State) -> Manifest:
    """Returns the manifest of a checkpoint of the networks, still without files."""
    return Manifest(format=FORMAT, layout=layout_record(networks), identity=identity, files=[], state=state)


def held_by_rank(networks: Mapping[str, Network]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what `load_checkpoint` restores on this rank: tensors, which the optimizers still hold, and the rest."""
    tensors = {name: each for key, net in networks.items() for name, each in network_tensors(net, key).items()}
    tensors[f"{RANDOM}/torch"] = torch.get_rng_state()
    # Cloned: random numbers may be drawn before a thread copies them.
    tracked = get_cuda_rng_tracker().get_states()
    tensors |= {f"{RANDOM}/megatron/{name}": each.clone() for name, each in tracked.items()}
    return tensors, {"networks": {key: network_state(net) for key, net in networks.items()}}


def layout_record(networks: Mapping[str, Network]) -> dict[str, Any]:
    """Returns the layout as a manifest records it."""
    policy = networks["policy"]
    layout = policy.layout
    degrees = {k: getattr(layout, k) for k in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    # Without it the layers of each stage follow from the degrees and the model.
    given = {"stage_layers": list(layout.stage_layers)} if layout.stage_layers else {}
    # Each bucket is cut into the ranks' shards; without overlap there is one bucket.
    buckets = {"shards": "by bucket"} if policy.engine.overlap != "none" else {}
    return {**degrees, **given, **buckets, "dtype": policy.engine.dtype}
