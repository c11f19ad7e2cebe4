"""What one rank can say of its configuration and of the files that it names, before anything is started.

`resolve` needs neither torch nor the other ranks. `local_files` says what this rank would read: launch.py compares it
with rank 0's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from megatron_rl.config.freeze import freeze_notes
from megatron_rl.config.layout import Layout
from megatron_rl.config.load import C, ConfigError, check_companions, check_config, load_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.switches import NoKL
from megatron_rl.data.generated import is_generated
from megatron_rl.models.architecture import Architecture, read_architecture, refuse_unserved
from megatron_rl.models.fields import ModelError
from megatron_rl.models.quantisation import refuse_quantised

# Read by every rank, small, and decisive: which tokens a text has, and what the weights mean.
_MODEL_TEXTS = ("*.json", "merges.txt", "*.model", "chat_template*")
Files = dict[str, dict[str, str]]
"""By key, what identifies each file that the key names: a digest of its text, or its size."""


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A configuration without contradictions, and what follows from it."""

    config: C
    arch: Architecture
    layout: Layout
    notes: tuple[str, ...] = ()
    """What the configuration leaves out of its presets and file, and what does less than it says, one line each."""


def resolve(cls: type[C], path: Path, overrides: Sequence[str], world_size: int) -> Resolved[C]:
    """Raises ConfigError with all mistakes of the configuration, or those of the models' config.json."""
    notes: list[str] = []
    config = load_config(cls, path, overrides, notes)
    try:
        arch = read_architecture(config.model.path)
        if isinstance(config, Config) and config.rollout.replay_from is None:
            refuse_quantised(config.model.path, "and rollout servers would take the trainer's weights for such too")
            refuse_unserved(config.model.path, arch)
    except ModelError as error:
        raise ConfigError(f"model.path: {error}") from None
    layout = check_config(config, arch, world_size)
    notes += freeze_notes(config)
    if isinstance(config, Config):
        check_companions(config, arch, layout)
    return Resolved(config, arch, layout, tuple(notes))


def model_dirs(config: Config | SftConfig) -> Iterator[tuple[str, Path, bool]]:
    """(key, directory, whether it is a critic's) of every model that this run loads."""
    yield "model.path", config.model.path, False
    if isinstance(config, Config):
        if config.model.reference is not None and not isinstance(config.objective.kl, NoKL):
            yield "model.reference", config.model.reference, False
        if config.critic is not None and config.critic.path is not None:
            yield "critic.path", config.critic.path, True


def local_files(resolved: Resolved[C], rank: int) -> Files:
    """What `rank` will read, by key. Raises ConfigError for what is not there.

    Data sets and saved rollouts are read by the data-parallel leaders alone, held-out prompts by rank 0.
    """
    config = resolved.config
    files = {key: _describe(key, path, _MODEL_TEXTS) for key, path, _ in model_dirs(config)}
    leads = resolved.layout.coordinates(rank).leads_replica
    replays = isinstance(config, Config) and config.rollout.replay_from is not None
    if leads and not replays and not is_generated(config.data.train):
        files["data.train"] = _describe("data.train", Path(config.data.train))
    if isinstance(config, Config):
        heldout = config.data.heldout
        if rank == 0 and heldout is not None and not is_generated(heldout):
            files["data.heldout"] = _describe("data.heldout", Path(heldout))
        if leads and config.rollout.replay_from is not None:
            files["rollout.replay_from"] = _describe("rollout.replay_from", config.rollout.replay_from / "rollouts")
    return files


def differing_files(mine: Files, theirs: Files) -> Iterator[str]:
    """One line for each key whose files are not those of rank 0, if both ranks read it."""
    for key in mine.keys() & theirs.keys():
        names = sorted(n for n in mine[key].keys() | theirs[key].keys() if mine[key].get(n) != theirs[key].get(n))
        if names:
            first = f"{names[0]} ({mine[key].get(names[0], 'absent')}, but {theirs[key].get(names[0], 'absent')} there)"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"{key}: not the files that rank 0 reads: {first}{more}; give every node the same"


def _describe(key: str, path: Path, texts: Iterable[str] = ()) -> dict[str, str]:
    try:
        if path.is_file():
            return {path.name: f"{path.stat().st_size} bytes"}
        if not path.is_dir():
            raise ConfigError(f"{key}: {path} does not exist; expected it on every node that reads it")
        found = {}
        for file in sorted(path.iterdir()):
            if not file.is_file() or file.name.startswith("."):
                continue
            if any(file.match(pattern) for pattern in texts):
                found[file.name] = f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
            elif not texts or file.suffix == ".safetensors":
                found[file.name] = f"{file.stat().st_size} bytes"
        return found
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
