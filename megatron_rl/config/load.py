"""A configuration from presets, one YAML file and dotted overrides; every mistake in it in one error. No torch.

Later wins: presets (and theirs), then the file, then overrides. Paths are relative to the current directory, as for any
command; only a preset given as a file is relative to the file that names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_rl.config.layout import Layout, LayoutError, check_layout
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture

C = TypeVar("C", Config, SftConfig)


class ConfigError(UserError):
    """Names each key, where it stands, what was found and what was expected, one line per mistake."""


@dataclass
class _Tree:
    """Nested values, and for each leaf's dotted key where it was last set."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], origin: str) -> None:
        _merge(self.values, values)
        self.origins.update(dict.fromkeys(_keys(values), origin))

    def origin(self, key: str) -> str:
        """Of the key, of the first key below it, or of the section above."""
        below = next((o for k, o in self.origins.items() if k.startswith(key + ".")), None)
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key) or below or ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but for 1e-5 (a number here) and a key given twice (an error here)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                where = f"{self.name}:{key_node.start_mark.line + 1}"
                raise ConfigError(f"{where}: {key_node.value}: given twice; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# "1e-5" without a point is a string to PyYAML.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Raises ConfigError with all mistakes at once."""
    tree = _Tree()
    own = _read_yaml(path)
    given = [_parse_override(text) for text in overrides]
    presets = next((values["presets"] for values, _ in reversed(given) if "presets" in values), own.get("presets", ()))
    for name in _as_names(presets, str(path)):
        _merge_preset(tree, name, path.parent, ())
    tree.merge(own, str(path))
    for values, origin in given:
        tree.merge(values, origin)
    tree.values["presets"] = _as_names(presets, str(path))
    unknown = _unknown_keys(cls, tree)
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return cls.model_validate(tree.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, tree) for e in error.errors())) from None


def dump_config(config: BaseModel) -> str:
    """YAML that loads back to the same configuration, presets already merged."""
    return yaml.safe_dump({**config.model_dump(mode="json"), "presets": []}, sort_keys=False)


def check_config(config: Config | SftConfig, arch: Architecture, world_size: int) -> Layout:
    """The layout; raises ConfigError with all contradictions between keys, the model and the world."""
    try:
        layout = Layout.resolve(config.parallel, world_size)
    except LayoutError as error:
        raise ConfigError(str(error)) from None
    problems = check_layout(layout, arch, config.engine)
    optim = config.optim
    if optim.schedule != "constant" and optim.decay_steps <= optim.warmup_steps:
        problems.append(
            f"optim.decay_steps: {optim.decay_steps}, but schedule {optim.schedule} needs more than warmup_steps "
            f"({optim.warmup_steps})"
        )
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr: {optim.min_lr} is above optim.lr {optim.lr}")
    problems += _check_rl(config, arch, layout) if isinstance(config, Config) else _check_sft(config, arch, layout)
    if problems:
        raise ConfigError("\n".join(problems))
    return layout


def _check_rl(config: Config, arch: Architecture, layout: Layout) -> list[str]:
    problems = []
    rollout, train, data = config.rollout, config.train, config.data
    if rollout.prompts_per_step % layout.dp:
        problems.append(
            f"rollout.prompts_per_step: {rollout.prompts_per_step} does not divide among {layout.dp} data-parallel replicas"
        )
    if rollout.prompts_per_step % train.mini_batches:
        problems.append(
            f"train.mini_batches: {train.mini_batches} does not divide rollout.prompts_per_step "
            f"{rollout.prompts_per_step}; a group is never split"
        )
    longest = data.max_prompt_tokens + rollout.max_response_tokens
    if longest > arch.max_position_embeddings:
        problems.append(
            f"data.max_prompt_tokens + rollout.max_response_tokens: {longest} is more than the model's "
            f"{arch.max_position_embeddings} positions"
        )
    if not train.recompute_old_logprobs and train.mini_batches > 1:
        problems.append(
            f"train.recompute_old_logprobs: false needs train.mini_batches 1, not {train.mini_batches}: after the first "
            "update the policy is no longer the old one"
        )
    if config.objective.aggregation == "constant-length" and config.objective.constant_length is None:
        problems.append("objective.constant_length: not set, needed by aggregation constant-length")
    if rollout.replay_from is not None and rollout.servers.urls:
        problems.append("rollout.replay_from: saved rollouts need no servers; drop rollout.servers.urls")
    return problems


def _check_sft(config: SftConfig, arch: Architecture, layout: Layout) -> list[str]:
    problems = []
    if config.batch_size < layout.dp:
        problems.append(f"batch_size: {config.batch_size} is less than {layout.dp} data-parallel replicas")
    if config.data.max_tokens > arch.max_position_embeddings:
        problems.append(
            f"data.max_tokens: {config.data.max_tokens} is more than the model's {arch.max_position_embeddings} positions"
        )
    return problems


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values or {}


def _parse_override(text: str) -> tuple[dict[str, Any], str]:
    key, equals, value = text.partition("=")
    origin = f"override {text!r}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{origin}: expected key=value, such as optim.lr=1e-5")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: the value is not YAML: {error}") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed, origin


def _as_names(presets: Any, origin: str) -> list[str]:
    names = [presets] if isinstance(presets, str) else list(presets or ())
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{origin}: presets: expected names, found {presets!r}")
    return names


def _merge_preset(tree: _Tree, name: str, directory: Path, chain: tuple[str, ...]) -> None:
    path = _preset_path(name, directory)
    if str(path) in chain:
        raise ConfigError(f"presets: a cycle: {' -> '.join((*chain, str(path)))}")
    values = _read_yaml(path)
    for inner in _as_names(values.pop("presets", ()), str(path)):
        _merge_preset(tree, inner, path.parent, (*chain, str(path)))
    tree.merge(values, str(path))


def _preset_path(name: str, directory: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return directory / name
    builtin = Path(str(resources.files("megatron_rl.config") / "presets" / f"{name}.yaml"))
    if not builtin.is_file():
        known = sorted(p.stem for p in builtin.parent.glob("*.yaml"))
        raise ConfigError(f"presets: no preset {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    return builtin


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        keys += _keys(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


def _unknown_keys(cls: type[BaseModel], tree: _Tree) -> list[str]:
    known = _schema_keys(cls)
    problems = []
    for key in _keys(tree.values):
        parents = {key.rsplit(".", n)[0] for n in range(key.count(".") + 1)}
        if key not in known and not parents & _leaf_keys(cls):
            problems.append(f"{tree.origin(key)}: {key}: no such key{_nearest(key, sorted(known))}")
    return problems


def _schema_keys(cls: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, info in cls.model_fields.items():
        keys.add(prefix + name)
        section = _section(info.annotation)
        if section is not None:
            keys |= _schema_keys(section, f"{prefix}{name}.")
    return keys


def _leaf_keys(cls: type[BaseModel]) -> set[str]:
    keys = _schema_keys(cls)
    return {k for k in keys if not any(other.startswith(k + ".") for other in keys)}


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    """The closest known key: by the whole of it, else by its last part."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:
        last = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)]
    return f"; did you mean {close[0]}?" if close else ""


def _explain(error: Any, tree: _Tree) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key}: not set, and it has no default"
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    return f"{tree.origin(key)}: {key}: {error['msg']}{found}"
