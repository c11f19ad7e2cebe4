"""Begins a run from a checkpoint of another run: --fork RUN@STEP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.data.prompts import PromptCursor
from megatron_rl.engine.checkpoint import check_files, load_checkpoint
from megatron_rl.engine.manifest import (
    CheckpointError,
    DamagedError,
    Identity,
    Manifest,
    State,
    other_architecture,
    other_files,
)
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.network import Network
from megatron_rl.lab.changes import config_at, read_changes
from megatron_rl.lab.run_records import Flat, differing, flat_config, read_frozen, shown_value
from megatron_rl.loop.progress import check_steps
from megatron_rl.models.registry import weights_of
from megatron_rl.ranks.collectives import broadcast_bytes, together


@dataclass(frozen=True)
class Fork:
    """What a run begins with that was forked. The same on every rank."""

    state: State
    record: Mapping[str, Any]
    """What fork.json says."""

    def __str__(self) -> str:
        keys = [each["key"] for each in self.record["changes"] if each["key"] != "run_dir"]
        differ = f"other values of {', '.join(keys)}" if keys else "the same configuration"
        anew = [f"optimizer of the {name}" for name in self.record["networks"] if name not in self.record["optimizers"]]
        anew += [] if self.record["data_goes_on"] else ["order of the data"]
        begins = f"; begun anew: {', '.join(anew)}" if anew else ""
        return f"forked from step {self.state.step} of {self.record['run']}, with {differ}{begins}"


def restore_fork(
    name: CheckpointName, config: Config | SftConfig, networks: Mapping[str, Network], identity: Identity | None
) -> Fork:
    """Restores the networks from another run's checkpoint, in which nothing changes. `identity`: rank 0's. Collective.

    A network that the checkpoint lacks, as a critic, stays as it was loaded. An optimizer goes on with its moments if
    its betas are the same, and begins anew otherwise; its count of steps for the learning rate goes on. The order of
    the data goes on if data and seed are the same.

    Raises a UserError, on every rank, for a checkpoint that is not there, is damaged, is of another command or
    architecture, has other frozen weights, or has made all steps of the new run.
    """
    control, leads = networks["policy"].place.control, networks["policy"].place.rank == 0
    told = b""
    with together(control):
        if leads:
            assert identity is not None
            told = orjson.dumps(_examine(name, config, networks, identity))
    answer = orjson.loads(broadcast_bytes(told, control))
    manifest, record = Manifest.model_validate(answer["manifest"]), answer["record"]
    directory = name.run / "checkpoints" / answer["directory"]
    if damage := check_files(directory, manifest, control):
        raise DamagedError(f"--fork: {damage}; name another checkpoint")
    restored = {key: networks[key] for key in record["networks"]}
    anew = [key for key in restored if key not in record["optimizers"]]
    load_checkpoint(directory, manifest, restored, without_moments=anew)
    for network in restored.values():
        network.skipped = 0  # of this run
    new: dict[str, Any] = {"evaluated": False}
    if not record["data_goes_on"]:
        new |= {"cursor": PromptCursor(config.seed).as_json(), "taken": []}
    return Fork(manifest.state.model_copy(update=new), record)


def _examine(
    name: CheckpointName, config: Config | SftConfig, networks: Mapping[str, Network], identity: Identity
) -> dict[str, Any]:
    """Rank 0's view of the checkpoint, for all ranks. Raises a UserError if no run can begin from it."""
    directory, manifest = name.find()
    step = manifest.state.step
    check_steps(config, step, f"--fork: the checkpoint {directory}", left=1)
    theirs = config_at(step, read_frozen(name.run), read_changes(name.run))
    ours = flat_config(dump_config(config))
    if ("steps" in theirs) != ("steps" in ours):
        was = "sft" if "steps" in theirs else "train"
        raise CheckpointError(
            f"--fork: {name.run} is a run of {was}; start from its weights instead: `megatron-rl export {name.run}"
            f"@{step} OUT`, and model.path=OUT"
        )
    shared = [key for key in networks if key in manifest.identity.models]
    for key in shared:
        _check_network(directory, manifest, networks[key], key, theirs, ours, identity)
    same_order = manifest.identity.data.get("data.train") == identity.data.get("data.train")
    record = {
        "run": str(name.run.resolve()),
        "id": manifest.identity.run,
        "step": step,
        "networks": shared,
        "optimizers": [key for key in shared if _same("betas", networks[key], theirs, ours)],
        "data_goes_on": same_order and theirs.get("seed") == ours.get("seed"),
        "changes": [{"key": key, "old": old, "new": new} for key, old, new in differing(theirs, ours)],
    }
    return {"directory": directory.name, "manifest": manifest.model_dump(mode="json"), "record": record}


def _same(setting: str, network: Network, theirs: Flat, ours: Flat) -> bool:
    key = f"{network.optim_section}.{setting}"
    return bool(theirs.get(key) == ours.get(key))


def _check_network(
    directory: Path, manifest: Manifest, network: Network, name: str, theirs: Flat, ours: Flat, identity: Identity
) -> None:
    then, now = manifest.identity.models[name], identity.models[name]
    if changes := other_architecture(then, now):
        raise CheckpointError(
            f"--fork: {directory} is of another model than {now.key}: {', '.join(changes)}; name a model of the same "
            "architecture"
        )
    key = f"{network.optim_section}.freeze"
    if not _same("freeze", network, theirs, ours):
        values = [shown_value(each.get(key, [])) for each in (theirs, ours)]
        raise CheckpointError(
            f"--fork: {key}: {values[0]} in {directory.parent.parent}, {values[1]} now, but a checkpoint has only the "
            f"weights that train. Leave it as it was, or start from its exported weights (megatron-rl export)"
        )
    stay = bool(ours.get(key)) or not all(weight.trained for weight in weights_of(network.arch))
    if stay and (changed := other_files(then, now)):
        raise CheckpointError(
            f"--fork: {now.key}: {', '.join(changed[:3])} differ from those that {directory.parent.parent} began with, "
            "and weights that do not train come from them; name the same model"
        )
