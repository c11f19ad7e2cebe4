"""A model of any checkpoint as a Hugging Face directory: in one process on the CPU, whatever layout wrote it.

The checkpoint has the fp32 weights that the optimizers step. Frozen weights, and all else that a model's directory
holds, come from the directory that the run began with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.disk import writes
from megatron_rl.engine.fragments import PARAM, Saved, read_saved
from megatron_rl.engine.manifest import CheckpointError, DamagedError, Manifest, first_damage, other_files
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.shard_file import ShardReader
from megatron_rl.engine.split_weights import split_weight
from megatron_rl.errors import MissingFileError
from megatron_rl.lab.run_records import read_frozen
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.identity import file_digests
from megatron_rl.models.registry import weights_of
from megatron_rl.models.shards import assemble, fill
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Weight
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, check_free, save_weights, torch_dtype


@dataclass(frozen=True)
class ExportedModel:
    step: int
    dtype: str
    directory: Path
    """The checkpoint's."""


def export_checkpoint(
    name: CheckpointName, out: Path, *, critic: bool = False, model: Path | None = None
) -> ExportedModel:
    """Writes the policy, or the `critic`, of a checkpoint as a Hugging Face directory, which appears whole or not at
    all. It equals, to the bit, what the run itself writes if it ends with this step.

    `model`: where the model's directory is that the run began with; None: where it was.

    Raises FileInTheWayError unless `out` is free, MissingFileError and CheckpointError for a checkpoint that is not
    there, is damaged, or has no critic, or whose model has changed since, and DiskError if `out` cannot be written.
    """
    check_free(out)
    directory, manifest = name.find()
    frozen = read_frozen(name.run)
    network = "critic" if critic else "policy"
    if network not in manifest.identity.models:
        raise CheckpointError(f"{directory} has no critic; leave out --critic")
    source = model or _source(frozen, network)
    _check_source(directory, manifest, network, source)
    if damage := first_damage(directory, manifest.files):
        raise DamagedError(f"{damage}; name another checkpoint")
    dtype = str(manifest.layout["dtype"])
    readers = [ShardReader(directory / file.name) for file in manifest.files]
    saved = read_saved(readers, network).get(PARAM)
    rounds = _rounding(frozen, network, torch_dtype(dtype))
    tensors = _tensors(saved, source, _frozen_kinds(frozen, network), torch_dtype(dtype), rounds, critic=critic)
    with writes(f"the model in {out}", out, then="start again"):
        save_weights(tensors, out, source, MAX_SHARD_BYTES, torch_dtype(dtype), critic)
    return ExportedModel(manifest.state.step, dtype, directory)


def _source(frozen: Mapping[str, Any], network: str) -> Path:
    """Returns the directory that the network began with."""
    path = frozen.get("critic.path", "null") if network == "critic" else "null"
    return Path(frozen["model.path"] if path == "null" else path)


def _check_source(directory: Path, manifest: Manifest, network: str, source: Path) -> None:
    """Raises MissingFileError or CheckpointError unless `source` is the directory that the network began with."""
    then = manifest.identity.models[network]
    advice = "name the directory by --model, or start in the directory in which the run was started"
    if not (source / "config.json").is_file():
        raise MissingFileError(f"{source}: no config.json, but the {network} of {directory} began with it; {advice}")
    now = then.model_copy(update={"files": file_digests(source)})
    if changed := other_files(then, now):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"{source}: {', '.join(changed[:3])}{more} are not those that the {network} of {directory} began with; "
            f"put them back, or {advice}"
        )


def _section(network: str) -> str:
    return "critic.optim" if network == "critic" else "optim"


def _frozen_kinds(frozen: Mapping[str, Any], network: str) -> list[str]:
    return list(frozen.get(f"{_section(network)}.freeze", []))


def _rounding(frozen: Mapping[str, Any], network: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns how the run's optimizer rounds its fp32 weights to the model's dtype."""
    if frozen.get(f"{_section(network)}.moments_dtype") == "bf16":
        # FusedAdam's own, which differs from torch's in ties
        return lambda weight: split_weight(weight)[0]
    return lambda weight: weight.to(dtype)


def _tensors(
    saved: Saved | None,
    source: Path,
    frozen: list[str],
    dtype: torch.dtype,
    rounds: Callable[[Tensor], Tensor],
    *,
    critic: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, whole tensor) in the order of exports; at most one tensor's weights are in memory."""
    files = TensorFiles(source)
    weights = [weight for weight in weights_of(read_architecture(source, critic)) if not weight.copy]

    def shards(weight: Weight) -> list[Tensor]:
        if weight.trained and weight.kind not in frozen:
            assert saved is not None, "the checkpoint has no weights"
            return [rounds(shard) for shard in saved.shards(weight, weight.name)]
        whole = torch.empty(weight.cut(0, 1)[0], dtype=dtype if weight.trained else torch.float32)
        if weight.optional and weight.sources[0].name not in files.names:
            return [whole.zero_()]
        fill(weight, whole, files.read, 0, 1)
        return [whole]

    for _, group in itertools.groupby(weights, lambda weight: [each.name for each in weight.sources]):
        yield from assemble((weight, shards(weight)) for weight in group)
