"""Digests of all that a study's results depend on, and what differs between two of them."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import megatron_rl
from megatron_rl.config.load import dump_config
from megatron_rl.config.resolve import model_dirs
from megatron_rl.config.schema import Config
from megatron_rl.data.generated import is_generated
from megatron_rl.lab.provenance import versions

Fingerprint = dict[str, dict[str, str]]
"""Digests or versions by part and name."""
NAMED = 3
"""Names that an error lists for each part."""
CODE_SUFFIXES = (".py", ".yaml")


def take_fingerprint(
    study_file: Path,
    content: bytes,
    bases: Iterable[Path],
    runs: Mapping[str, Config],
    directory: Path,
    donors: Iterable[Path] = (),
) -> Fingerprint:
    """Digests the study file, its base configurations, each run's configuration, this package, versions of what it runs
    on, models (`donors` are those of which runs get some weights) and saved rollouts from outside of the study's
    directory, data sets, and own objectives and verifiers."""
    configs = list(runs.values())
    return {
        "study file": {study_file.name: _sha(content)},
        "base configuration": {str(path): _sha(path.read_bytes()) for path in sorted(set(bases))},
        "configurations": {name: _sha(dump_config(config).encode()) for name, config in runs.items()},
        "megatron_rl": source_digests(Path(megatron_rl.__file__).parent),
        "software": {
            name: str(version) for name, version in versions().items() if name not in ("platform", "cpu_count")
        },
        "model": _models(configs, donors, directory),
        "data": _of_paths(path for config in configs for path in _data(config)),
        "rollouts": _of_paths(_rollouts(configs, directory)),
        "own code": _own_code(configs),
    }


def source_digests(package: Path) -> dict[str, str]:
    """Digests of a package's code and presets, by file relative to it."""
    files = (file for file in package.rglob("*") if file.suffix in CODE_SUFFIXES and file.is_file())
    return {file.relative_to(package).as_posix(): _sha(file.read_bytes()) for file in sorted(files)}


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """One line for each part that differs, with the names of what was changed, added or removed."""
    lines = []
    for part in before.keys() | now.keys():
        old, new = before.get(part, {}), now.get(part, {})
        changed = [
            f"{name} {_how(name, old, new)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if changed:
            more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            lines.append(f"{part}: {', '.join(changed[:NAMED])}{more}")
    return sorted(lines)


def _how(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    if name not in old:
        return "was added"
    return "was removed" if name not in new else "has changed"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _models(configs: Iterable[Config], donors: Iterable[Path], directory: Path) -> dict[str, str]:
    """Digests of models outside of `directory`; the study itself makes those inside."""
    from megatron_rl.models.identity import file_digests  # needs torch

    models = {model for config in configs for _, model, _ in model_dirs(config)} | set(donors)
    outside = sorted(model for model in models if not model.is_relative_to(directory))
    return {f"{model}/{name}": digest for model in outside for name, digest in file_digests(model).items()}


def _data(config: Config) -> Iterable[Path]:
    sources = [config.data.heldout]
    if config.rollout.replay_from is None:
        sources.append(config.data.train)
    return [Path(source) for source in sources if source is not None and not is_generated(source)]


def _rollouts(configs: Iterable[Config], directory: Path) -> Iterable[Path]:
    """Rollouts of runs outside of `directory`; the study itself makes those inside."""
    sources = {config.rollout.replay_from for config in configs}
    return [path / "rollouts" for path in sources if path is not None and not path.is_relative_to(directory)]


def _of_paths(paths: Iterable[Path]) -> dict[str, str]:
    """Digests of files, and of all files in directories."""
    files: set[Path] = set()
    for path in set(paths):
        files |= {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path}
    found = {}
    for file in sorted(files):
        with file.open("rb") as stream:
            found[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _own_code(configs: Iterable[Config]) -> dict[str, str]:
    """Digests of the modules with the user's objectives and verifiers."""
    names = {config.objective.custom for config in configs} | {config.data.verifier for config in configs}
    found = {}
    for module in sorted({name.partition(":")[0] for name in names if name and ":" in name}):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            found[module] = _sha(Path(spec.origin).read_bytes())
    return found
