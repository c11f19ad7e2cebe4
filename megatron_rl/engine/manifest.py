"""The manifest of a checkpoint: what it must be before a byte of it is trusted. No torch.

A checkpoint directory is complete exactly when manifest.json is in it. The manifest names each rank's file with its
size and digest, the layout, the run, and the model and data that the run began with; it carries a digest of itself.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_rl.errors import UserError

FORMAT: Literal[5] = 5
MANIFEST = "manifest.json"
PARTIAL = ".partial"
"""Ending of a directory that is being written or deleted."""
_NAME = re.compile(r"step-(\d{6,})")

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


LayoutRecord = Mapping[str, int | str | list[int]]
"""Degrees of parallelism, dtype, the layers of each stage if they were given, and how shards are cut if they are cut by
bucket (engine.overlap)."""


class CheckpointError(UserError):
    """A checkpoint of another dtype, run, model or data."""


class DamagedError(CheckpointError):
    """A checkpoint that is not whole: an older one may be."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ShardFile(_StrictModel):
    """One rank's file."""

    name: Annotated[str, Field(pattern=r"^rank-\d{5}\.safetensors$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: _Digest


class ModelIdentity(_StrictModel):
    """A model as the run began with it."""

    key: str
    """The configuration's key of its path."""
    architecture: dict[str, Any]
    files: dict[str, str]
    """A digest for each file of the model's directory that a run reads."""


class Identity(_StrictModel):
    """Which run a checkpoint is of, and what that run computes on: a resume must find the same."""

    run: str
    models: dict[str, ModelIdentity]
    """By network."""
    data: dict[str, str]
    """Digests of the data sets' records and their order, by key of the configuration."""


class State(_StrictModel):
    """Progress of a run."""

    step: Annotated[int, Field(ge=0)]
    cursor: dict[str, int]
    taken: list[Annotated[int, Field(ge=0)]] = []
    """Numbers of the prompts after the cursor that steps have taken."""
    weight_version: Annotated[int, Field(ge=0)] = 0
    evaluated: bool = True
    """Whether the evaluation that was due after `step` has been made."""


class Manifest(_StrictModel):
    format: Literal[5]
    layout: LayoutRecord
    identity: Identity
    files: list[ShardFile]
    state: State

    def to_bytes(self) -> bytes:
        content = self.model_dump(mode="json")
        return orjson.dumps({**content, "sha256": _digest(content)}, option=orjson.OPT_INDENT_2)


def read_manifest(directory: Path) -> Manifest:
    """Raises DamagedError if the manifest is not as it was written, and CheckpointError for another format."""
    path = directory / MANIFEST
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{directory}: no {MANIFEST}, so this checkpoint was never completed") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise DamagedError(f"{path}: damaged: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: damaged: found {type(content).__name__}, expected an object")
    said = content.pop("sha256", None)
    try:
        intact = said == _digest(content)
        # Formats before 3 had no digest.
        if content.get("format") != FORMAT and (intact or said is None):
            raise CheckpointError(
                f"{path}: format {content.get('format')}, this version reads {FORMAT}; resume with the version that "
                "wrote it, or start a new run from exported weights"
            )
        if not intact:
            raise DamagedError(f"{path}: damaged: its content is not what its sha256 says")
        manifest = Manifest.model_validate(content)
    except (ValidationError, orjson.JSONEncodeError) as error:
        raise DamagedError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    if step_of(directory) != manifest.state.step:
        raise DamagedError(f"{path}: of step {manifest.state.step}, but its directory is {directory.name}")
    return manifest


def check_identity(directory: Path, manifest: Manifest, layout: LayoutRecord, now: Identity) -> None:
    """Raises CheckpointError if the checkpoint is of another dtype, run, model or data than this start."""
    then = manifest.identity
    if then.run != now.run:
        raise CheckpointError(
            f"{directory}: of another run ({then.run}) than this run_dir's ({now.run}); move it out of "
            f"{directory.parent}"
        )
    if (before := manifest.layout.get("dtype")) != layout["dtype"]:
        raise CheckpointError(
            f"{directory}: written with engine.dtype {before}, resumed with {layout['dtype']}, which computes "
            "something else. Resume with the same one, or start a new run from the exported weights"
        )
    if then.models.keys() != now.models.keys():
        raise CheckpointError(f"{directory}: of {', '.join(then.models)}, but this run has {', '.join(now.models)}")
    problems = [problem for name in now.models for problem in _model_changes(then.models[name], now.models[name])]
    problems += [
        f"{key}: not the data set that the run began with; its records or their order have changed"
        for key in sorted(then.data.keys() | now.data.keys())
        if then.data.get(key) != now.data.get(key)
    ]
    if problems:
        raise CheckpointError(
            f"{directory}: "
            + "; ".join(problems)
            + ". Put back what the run began with, or start a new run in another "
            "run_dir"
        )


def first_damage(directory: Path, files: Iterable[ShardFile]) -> str:
    """Returns what is wrong with one of these files of the checkpoint; empty if nothing is."""
    for entry in files:
        path = directory / entry.name
        try:
            with path.open("rb") as file:
                whole = path.stat().st_size == entry.bytes
                whole = whole and hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        if not whole:
            return f"{path}: not what its manifest says"
    return ""


def other_architecture(then: ModelIdentity, now: ModelIdentity) -> list[str]:
    """Returns `field value, not value` for each feature in which the two models differ."""
    fields = sorted(now.architecture.keys() | then.architecture.keys())
    values = ((f, then.architecture.get(f, "absent"), now.architecture.get(f, "absent")) for f in fields)
    return [f"{field} {before}, not {after}" for field, before, after in values if before != after]


def other_files(then: ModelIdentity, now: ModelIdentity) -> list[str]:
    """Returns the names of the files that are not the same in the two models' directories."""
    return sorted(f for f in then.files.keys() | now.files.keys() if then.files.get(f) != now.files.get(f))


def _model_changes(then: ModelIdentity, now: ModelIdentity) -> list[str]:
    if differing := other_architecture(then, now):
        return [f"of another model than {now.key}: {', '.join(differing)}"]
    if changed := other_files(then, now):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return [f"of another model than {now.key}: {', '.join(changed[:3])}{more} differ from those that it began with"]
    return []


def checkpoints(root: Path) -> list[Path]:
    """Returns the checkpoints under `root` that have a manifest, oldest first. What has another name is none."""
    found = [path.parent for path in root.glob(f"step-*/{MANIFEST}") if _NAME.fullmatch(path.parent.name)]
    return sorted(found, key=step_of)


def strangers(root: Path) -> list[Path]:
    """Returns what lies under `root` and is no checkpoint, nor the rest of one."""
    known = {path.name for path in checkpoints(root)}
    return sorted(p for p in root.iterdir() if p.name not in known and p.suffix != PARTIAL) if root.is_dir() else []


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints."""
    for old in checkpoints(root)[:-keep]:
        # Never a checkpoint without some of its files, should this be cut off.
        partial = old.with_name(old.name + PARTIAL)
        old.rename(partial)
        shutil.rmtree(partial)


def remove_partial(root: Path) -> None:
    """Deletes what saves that were cut off have left. Only rank 0 calls it."""
    for partial in root.glob("step-*" + PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)


def step_of(directory: Path) -> int:
    match = _NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
