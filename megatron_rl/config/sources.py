"""What a configuration is read from, merged into one tree of values: presets, a YAML file, dotted overrides. No torch.

Every key keeps the place and the preset that set it last. Mistakes are gathered, so that all are reported at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_rl.config.sections import Kinds
from megatron_rl.config.yaml12 import MAX_BYTES, MAX_DEPTH, YamlError, read_yaml
from megatron_rl.errors import UserError

PRESETS = Path(str(resources.files("megatron_rl.config"))) / "presets"
MAX_PRESETS = 64
MAX_SHOWN = 120
"""Characters of a value in an error."""
PRESET_KEYS = (
    "objective",
    "reward.correct",
    "reward.wrong",
    "reward.overlong_cache",
    "reward.overlong_filter",
    "rollout.dynamic_sampling",
)
"""Keys, with all below them, that a built-in preset sets back to their defaults if a preset before it has set them."""


class ConfigError(UserError):
    """Names each key, where it stands, what was found and what was expected, one line per mistake."""


@dataclass
class Tree:
    """Nested values, with the place (`file:line`, or the override) and the preset of each dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    lenders: dict[str, str] = field(default_factory=dict)
    """The preset that set a key last; keys that the user's file or an override set have none."""
    presets: list[str] = field(default_factory=list)
    """The presets that are in the values, in order."""
    holds_built_in: bool = False
    notes: list[str] = field(default_factory=list)
    """What the user's layers take out of layers below them, one line each."""

    def merge(self, other: Tree) -> None:
        """Sets every key of the other tree. Nothing is shared with it."""
        _merge(self.values, other.values)
        self.places.update(other.places)
        self.lenders = {key: name for key, name in self.lenders.items() if key not in other.places} | other.lenders
        self.presets += other.presets
        self.holds_built_in |= other.holds_built_in
        self.notes += other.notes

    def overlay(self, layer: Tree, kinds: Mapping[str, Kinds]) -> None:
        """Merges a later layer: another kind replaces its section, a built-in preset the objective below it."""
        for key in PRESET_KEYS if layer.holds_built_in else ():
            self.drop(key)
        for section, its in kinds.items():
            mine, theirs = self.get(section), layer.get(section)
            if not (isinstance(mine, dict) and isinstance(theirs, dict) and its.name in theirs):
                continue
            old, new = mine.get(its.name, its.default), theirs[its.name]
            if new != old:
                if not layer.presets:  # the user's own layer
                    place = layer.place(f"{section}.{its.name}")
                    self._note_loss(section, its, f"{its.name} {new} ({place}) replaces {old}")
                self.drop(section)
        self.merge(layer)

    def _note_loss(self, section: str, its: Kinds, why: str) -> None:
        """Notes the keys that a section loses besides the name of its kind, if there are any."""
        values = self.get(section)
        lost = [f"{key} {shown(values[key])} ({self.origin(f'{section}.{key}')})" for key in values if key != its.name]
        if lost:
            self.notes.append(f"{section}: {why}, with its {', '.join(lost)}")

    def get(self, key: str) -> Any:
        """The value of a dotted key, or None."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def drop(self, key: str) -> None:
        """Removes a key and all below it."""
        section, _, last = key.rpartition(".")
        around = self.get(section) if section else self.values
        if isinstance(around, dict):
            around.pop(last, None)
        for each in [*self._below(key)]:
            del self.places[each]
            self.lenders.pop(each, None)

    def place(self, key: str) -> str | None:
        """The place of the key, or of the nearest section around it."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key)

    def origin(self, key: str) -> str | None:
        """The preset that set the key, or else its place."""
        return f"preset {self.lenders[key]}" if key in self.lenders else self.place(key)

    def is_lent(self, key: str, cause: str) -> bool:
        """Whether presets alone have set the key, and something else has set its cause."""
        lenders = {self.lenders.get(each) for each in self._below(key)}
        return bool(lenders) and None not in lenders and cause in self.places and self.lenders.get(cause) not in lenders

    def _below(self, key: str) -> Iterator[str]:
        return (each for each in self.places if each == key or each.startswith(f"{key}."))


def read_sources(path: Path, overrides: Sequence[str], kinds: Mapping[str, Kinds], problems: list[str]) -> Tree:
    """Presets, then the file, then the overrides; later wins. In the result `merged_presets` stands for `presets`.

    `kinds` has the sections that come in kinds: a layer that names another kind replaces the section. Appends to
    `problems` what can be said of one key; raises ConfigError for a file that cannot be read at all.
    """
    own, given = _read_file(path, problems), Tree()
    for text in overrides:
        given.merge(_parse_override(text, problems))  # one layer: their order does not matter to a kind
    # Presets named by an override replace the file's, and are found from the current directory.
    naming, directory = (given, Path()) if "presets" in given.values else (own, path.parent)
    tree = Tree()
    for name in _take_names(naming, "presets", problems):
        chain = (path.resolve(),)
        tree.overlay(_read_preset(name, directory, chain, naming.places["presets"], kinds, problems), kinds)
    for layer in (own, given):
        layer.values.pop("presets", None)
        names = _take_names(layer, "merged_presets", problems)
        tree.overlay(layer, kinds)
        tree.presets += names
    tree.values["merged_presets"] = tree.presets
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}. Lists and empty sections are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def shown(value: Any) -> str:
    """A value as errors show it: JSON, and no more of it than a line holds."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean X?` for the known key with the closest last part, in the same section first; or nothing."""
    section, _, last_part = name.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    for candidates in (siblings, known):
        by_last_part = {key.rpartition(".")[2]: key for key in candidates}
        close = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.7)
        if close:
            return f"; did you mean {by_last_part[close[0]]}?"
    return ""


# ---- files and overrides ---------------------------------------------------------------------------------------


def _read_file(path: Path, problems: list[str]) -> Tree:
    try:
        with path.open("rb") as file:  # not the whole: it may be a device without an end
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    try:
        values, places = read_yaml(text, lambda line: f"{path}:{line}", problems)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: found {shown(values)}, expected keys and values")
    return Tree(values or {}, places)


def _parse_override(text: str, problems: list[str]) -> Tree:
    key, equals, written = text.partition("=")
    where = f"override {text!r}" if len(text) <= MAX_SHOWN else f"override {text[:MAX_SHOWN]!r}..."
    parts = key.split(".")
    if not equals or not all(parts) or not key.isprintable() or " " in key or len(parts) > MAX_DEPTH:
        problems.append(f"{where}: expected key=value, such as optim.lr=1e-5")
        return Tree()
    try:
        value, below = read_yaml(written, lambda _: where, problems)
    except YamlError as error:
        problems.append(str(error))
        return Tree()
    for part in reversed(parts):
        value = {part: value}
    sections = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return Tree(value, dict.fromkeys([*sections, key, *(f"{key}.{inner}" for inner in below)], where))


# ---- presets ---------------------------------------------------------------------------------------------------


def _take_names(tree: Tree, key: str, problems: list[str]) -> list[str]:
    """Takes the key out of the values."""
    value = tree.values.pop(key, None)
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{tree.place(key)}: {key}: found {shown(value)}, expected a list of names or files")
        return []
    return names


def _read_preset(
    name: str,
    directory: Path,
    chain: tuple[Path, ...],
    place: str,
    kinds: Mapping[str, Kinds],
    problems: list[str],
) -> Tree:
    """A preset with those that it names, below `chain`: the files that lead to it."""
    is_file = name.endswith((".yaml", ".yml"))
    known = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    path = directory / name if is_file else PRESETS / f"{name}.yaml"
    if not (_is_file(path) if is_file else name in known):
        expected = "an existing file" if is_file else f"one of {', '.join(known)}, or a .yaml file"
        problems.append(f"{place}: presets: found {name[:MAX_SHOWN]!r}, expected {expected}")
        return Tree()
    if path.resolve() in chain:
        cycle = " -> ".join(str(file) for file in (*chain, path.resolve()))
        raise ConfigError(f"{place}: presets: {name!r} leads back to itself: {cycle}")
    own, tree = _read_file(path, problems), Tree()
    for inner in _take_names(own, "presets", problems):
        here = (*chain, path.resolve())
        tree.overlay(_read_preset(inner, path.parent, here, own.places["presets"], kinds, problems), kinds)
    shown_name = str(path) if is_file else name
    own.presets = [*_take_names(own, "merged_presets", problems), shown_name]
    own.lenders = dict.fromkeys(own.places, shown_name)
    own.holds_built_in = not is_file
    tree.overlay(own, kinds)
    if len(tree.presets) > MAX_PRESETS:  # each may name two, and each of those two: the work doubles with every file
        raise ConfigError(f"{place}: presets: {name!r} merges more than {MAX_PRESETS} presets; name fewer")
    return tree


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long
        return False


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(value, Mapping):
            into[key] = value
            continue
        if not isinstance(into.get(key), dict):
            into[key] = {}
        _merge(into[key], value)
