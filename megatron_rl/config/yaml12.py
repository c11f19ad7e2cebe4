"""YAML as its version 1.2 reads it [yaml.org/spec/1.2.2, core schema], bounded, and with the line of every key.

PyYAML scans and composes; what a plain scalar means is decided here, as PyYAML follows YAML 1.1: 010 would be 8, 1:30
would be 90, `no` would be false and 1e-5 text. Mistakes of one key are gathered; what cannot be read at all raises.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from megatron_rl.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 10_000
"""With aliases written out: a few lines of aliases to aliases stand for billions of values."""
INT64 = range(-(2**63), 2**63)

_STR, _INT, _FLOAT, _MAP, _SEQ = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "map", "seq"))
_PLAIN = "plain"  # the tag of a scalar without quotes and without a tag of its own
_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INTEGER = re.compile(r"(?P<decimal>[-+]?[0-9]+)|0o(?P<octal>[0-7]+)|0x(?P<hex>[0-9a-fA-F]+)", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_SPECIAL = re.compile(r"(?P<sign>[-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)


class YamlError(UserError):
    """Text that cannot be read as a configuration at all; names the place."""


def read_yaml(text: str, place: Callable[[int], str], problems: list[str]) -> tuple[Any, dict[str, str]]:
    """The value of the only document, and the place of each dotted key in it; `place` names the place of a line.

    Appends to `problems` what can be said of one key. Raises YamlError for what is not YAML 1.2, and for a tag, a
    nesting, a number of values or an integer beyond the bounds.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(f"{place(1)}: more than {MAX_BYTES} characters; expected a configuration")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"{place(line)}: not YAML: the character {chr(error.character)!r} may not be in it") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlError(f"{place(line)}: not YAML: {error.problem}") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF", a %YAML version of many digits
        raise YamlError(f"{place(1)}: not YAML: {error}") from None
    if node is None:
        return None, {}
    reading = _Reading(place, problems)
    return reading.value(node, ""), reading.places


def resolve_scalar(text: str) -> Any:
    """What a plain scalar means under the core schema: None, a boolean, an int, a float, or the text itself.

    Raises OverflowError for an integer of more than 64 bits.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if match := _INTEGER.fullmatch(text):
        kind = match.lastgroup or "decimal"
        digits = match[kind]
        if len(digits) > 100:  # int() is slow on many digits, and refuses more than 4,300
            raise OverflowError
        number = int(digits, {"decimal": 10, "octal": 8, "hex": 16}[kind])
        if number not in INT64:
            raise OverflowError
        return number
    if _NUMBER.fullmatch(text):
        return float(text)
    if match := _SPECIAL.fullmatch(text):
        return float(f"{match['sign']}inf") if match["sign"] is not None else float("nan")
    return text


def write_yaml(values: Mapping[str, Any]) -> str:
    """What `read_yaml` reads back as the same values, and a reader of YAML 1.1 too, but for floats such as 1e-5."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Composes only. Stops at a nesting that no configuration has, long before Python's stack ends."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of a node that has none of its own."""
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _STR
        return _SEQ if kind is yaml.SequenceNode else _MAP


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that either version of YAML would take for something else."""


_Dumper.add_implicit_resolver(_INT, _INTEGER, list("-+0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, re.compile(_NUMBER.pattern + "$"), list("-+.0123456789"))


class _Reading:
    """One document's values. An alias is read again wherever it stands, so that no two keys share a value."""

    def __init__(self, place: Callable[[int], str], problems: list[str]) -> None:
        self.places: dict[str, str] = {}
        self._place = place
        self._problems = problems
        self._values = 0
        self._above: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: str) -> Any:
        """Value of the node at the dotted `key`."""
        if isinstance(node, yaml.ScalarNode):
            self._count(node, key)
            return self._scalar(node, key)
        with self._inside(node, key):
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            return [self.value(item, _join(key, str(number))) for number, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, above: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        own: set[str] = set()
        # Merged sections first: whatever stands in this one wins, and its places too.
        pairs = sorted(node.value, key=lambda pair: not _merges(pair[0]))
        for key_node, value_node in pairs:
            if _merges(key_node):
                values |= self._merged(value_node, above)
                continue
            name = self._name(key_node, above)
            key, place = _join(above, name), self._place(key_node.start_mark.line + 1)
            if name in own:
                self._problems.append(f"{place}: {key}: given twice, also at {self.places[key]}; keep one")
            own.add(name)
            self.places[key] = place
            values[name] = self.value(value_node, key)
        return values

    def _merged(self, node: yaml.Node, above: str) -> dict[str, Any]:
        """`<<: *section` or `<<: [*one, *two]`, of which the first wins."""
        sections = node.value[::-1] if isinstance(node, yaml.SequenceNode) else [node]
        values: dict[str, Any] = {}
        for section in sections:
            if not isinstance(section, yaml.MappingNode):
                raise self._error(section, above, "<< merges sections of keys, and found something else")
            with self._inside(section, above):
                values |= self._mapping(section, above)
        return values

    @contextlib.contextmanager
    def _inside(self, node: yaml.Node, key: str) -> Iterator[None]:
        self._count(node, key)
        if node in self._above:
            raise self._error(node, key, "an alias to what it is in")
        if len(self._above) >= MAX_DEPTH:
            raise self._error(node, key, f"nested more than {MAX_DEPTH} deep, with aliases written out")
        if node.tag not in (_MAP, _SEQ):
            raise self._error(node, key, _tagged(node))
        self._above.append(node)
        yield
        self._above.pop()

    def _count(self, node: yaml.Node, key: str) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(node, key, f"more than {MAX_VALUES} values, with aliases written out")

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        text: str = node.value
        if node.tag not in (_PLAIN, _STR):
            raise self._error(node, key, _tagged(node))
        if bad := next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None):
            raise self._error(node, key, f"found text with {bad!r} in it, which no file name or model can have")
        if node.tag == _STR:
            return text
        try:
            return resolve_scalar(text)
        except OverflowError:
            raise self._error(node, key, f"found an integer of {len(text)} digits, expected at most 64 bits") from None

    def _name(self, node: yaml.Node, above: str) -> str:
        """Keys are text, also where they look like something else: `on`, 1."""
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, above, "found a key that is a list or a section, expected text")
        if node.tag not in (_PLAIN, _STR):
            raise self._error(node, above, _tagged(node))
        name: str = node.value
        if not name or not name.isprintable() or "." in name:
            hint = "; in a file write the sections one inside the other, as optim: {lr: 1e-5}" if "." in name else ""
            raise self._error(node, above, f"found the key {name[:80]!r}, which no key is called{hint}")
        return name

    def _error(self, node: yaml.Node, key: str, what: str) -> YamlError:
        where = self._place(node.start_mark.line + 1)
        return YamlError(f"{where}: {key}: {what}" if key else f"{where}: {what}")


def _merges(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN and node.value == "<<"


def _join(above: str, name: str) -> str:
    return f"{above}.{name}" if above else name


def _tagged(node: yaml.Node) -> str:
    written = node.tag.replace("tag:yaml.org,2002:", "!!")
    return f"found the tag {written[:80]}, expected a plain value; a configuration needs no tags"
