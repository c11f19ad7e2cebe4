"""What a configuration is read from, merged into one tree of values: presets, a YAML file, dotted overrides. No torch.

Every key keeps the place that set it last, for the errors. Mistakes are gathered, so that all are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.errors import UserError

PRESETS = Path(str(resources.files("megatron_rl.config"))) / "presets"
_FLOAT, _TEXT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "str", "timestamp"))


class ConfigError(UserError):
    """Names each key, where it stands, what was found and what was expected, one line per mistake."""


@dataclass
class Tree:
    """Nested values, the place of each dotted key (`file:line`, or the override), and the presets that are in them."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    presets: list[str] = field(default_factory=list)

    def merge(self, other: Tree) -> None:
        """The other tree's values win. Nothing is shared with it."""
        _merge(self.values, other.values)
        self.places.update(other.places)
        self.presets += other.presets

    def place(self, key: str) -> str | None:
        """Of the key, or of the nearest section around it."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key)


def read_sources(path: Path, overrides: Sequence[str], problems: list[str]) -> Tree:
    """Presets, then the file, then the overrides; later wins. In the result `merged_presets` stands for `presets`.

    Appends to `problems` what can be said of one key; raises ConfigError for a file that cannot be read at all.
    """
    own, given = _read_file(path, problems), Tree()
    for text in overrides:
        given.merge(_parse_override(text, problems))
    # Presets named by an override replace the file's, and are found from the current directory.
    naming, directory = (given, Path()) if "presets" in given.values else (own, path.parent)
    tree = Tree()
    for name in _take_names(naming, "presets", problems):
        tree.merge(_read_preset(name, directory, (path.resolve(),), naming.places["presets"], problems))
    for layer in (own, given):
        layer.values.pop("presets", None)
        layer.presets = _take_names(layer, "merged_presets", problems)
        tree.merge(layer)
    tree.values["merged_presets"] = tree.presets
    return tree


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


# ---- YAML ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but 1e-5 is a number here, and a date is text."""


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that _Loader would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, place: Callable[[int], str], problems: list[str]) -> tuple[Any, dict[str, str]]:
    """The value, and the place of each dotted key in it; `place` names that of a line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        places: dict[str, str] = {}
        for key, line in _named_keys(node):
            if key in places:
                problems.append(f"{place(line)}: {key}: given twice, also at {places[key]}; keep one")
            places[key] = place(line)
        return loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{place(line)}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place(1)}: not YAML: {error}") from None
    finally:
        loader.dispose()


def write_yaml(values: Mapping[str, Any]) -> str:
    """What `read_sources` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _named_keys(node: yaml.Node, prefix: str = "", above: tuple[yaml.Node, ...] = ()) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key, also of one that is given twice. Makes all keys text: `on` is no boolean."""
    if node in above:
        raise yaml.constructor.ConstructorError(problem="an alias to what it is in", problem_mark=node.start_mark)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
            key_node.tag = _TEXT
            yield prefix + key_node.value, key_node.start_mark.line + 1
            yield from _named_keys(value_node, f"{prefix}{key_node.value}.", (*above, node))


def _read_file(path: Path, problems: list[str]) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    values, places = _parse(text, lambda line: f"{path}:{line}", problems)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: found {values!r}, expected keys and values")
    return Tree(values or {}, places)


def _parse_override(text: str, problems: list[str]) -> Tree:
    key, equals, written = text.partition("=")
    where = f"override {text!r}"
    parts = key.split(".")
    if not equals or not all(parts) or key != key.strip():
        problems.append(f"{where}: expected key=value, such as optim.lr=1e-5")
        return Tree()
    try:
        value, below = _parse(written, lambda _: where, problems)
    except ConfigError as error:
        problems.append(str(error))
        return Tree()
    for part in reversed(parts):
        value = {part: value}
    sections = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return Tree(value, dict.fromkeys([*sections, key, *(f"{key}.{inner}" for inner in below)], where))


# ---- presets ---------------------------------------------------------------------------------------------------


def _take_names(tree: Tree, key: str, problems: list[str]) -> list[str]:
    """Takes the key out of the values."""
    value = tree.values.pop(key, None) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{tree.place(key)}: {key}: found {value!r}, expected a list of names or files")
        return []
    return names


def _read_preset(name: str, directory: Path, chain: tuple[Path, ...], place: str, problems: list[str]) -> Tree:
    """A preset with those that it names, below `chain`: the files that lead to it."""
    is_file = name.endswith((".yaml", ".yml"))
    path = directory / name if is_file else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        expected = "an existing file" if is_file else f"one of {known}, or a .yaml file"
        problems.append(f"{place}: presets: found {name!r}, expected {expected}")
        return Tree()
    if path.resolve() in chain:
        cycle = " -> ".join(str(file) for file in (*chain, path.resolve()))
        raise ConfigError(f"{place}: presets: {name!r} leads back to itself: {cycle}")
    own, tree = _read_file(path, problems), Tree()
    for inner in _take_names(own, "presets", problems):
        tree.merge(_read_preset(inner, path.parent, (*chain, path.resolve()), own.places["presets"], problems))
    own.presets = [*_take_names(own, "merged_presets", problems), str(path) if is_file else name]
    tree.merge(own)
    return tree


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(value, Mapping):
            into[key] = value
            continue
        if not isinstance(into.get(key), dict):
            into[key] = {}
        _merge(into[key], value)
