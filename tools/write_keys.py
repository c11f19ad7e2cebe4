"""Writes docs/keys.md, the page of all configuration keys, from megatron_rl/config/schema.py.

python tools/write_keys.py
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_rl.config.bounds import LARGEST_INT
from megatron_rl.config.schema import Config, SftConfig

PAGE = Path(__file__).parent.parent / "docs" / "keys.md"
INTRODUCTION = """\
# Configuration keys

Every key of the YAML file that `megatron-rl train` and `megatron-rl sft` read. `python tools/write_keys.py` writes this
page from `schema.py`, `switches.py` and `stress.py` in `megatron_rl/config`; edit the docstrings there, not this
page.

A key can also be set on the command line, as `optim.lr=1e-5`. In YAML the part before the last dot is a section:
`optim: {lr: 1.0e-5}`. A section or key whose values include null can be switched off with `null`. `megatron-rl train
run.yaml --dry-run` prints what a file resolves to, presets included.
"""
NAMES: dict[Any, str] = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}
LARGE = 1e6
"""Bounds from here on only catch slips of the keyboard; the page leaves them out."""


@dataclass(frozen=True)
class Section:
    """A table of keys. `kinds` holds the alternatives of a discriminated union; a plain section has one."""

    key: str
    kinds: tuple[type[BaseModel], ...]
    discriminator: str | None
    nullable: bool
    default: Any
    meaning: str = field(default="", compare=False)
    """The docstring below its field."""


def write_page() -> str:
    """The whole page. Sections of SFT that are sections of RL too are named, not repeated."""
    shown: dict[str, Section] = {}
    parts = [INTRODUCTION]
    for command, config in (("train", Config), ("sft", SftConfig)):
        parts.append(f"## Keys of `megatron-rl {command}`\n")
        repeated = []
        for section in list_sections(Section("", (config,), None, False, PydanticUndefined)):
            if section.key and shown.get(section.key) == section:
                repeated.append(f"`{section.key}`")
                continue
            if command == "train":
                shown[section.key] = section
            parts.append(write_section(section))
        if repeated:
            parts.append(f"`megatron-rl sft` also has these sections of `megatron-rl train`: {', '.join(repeated)}.\n")
    return "\n".join(part for part in parts if part)


def list_sections(section: Section) -> Iterator[Section]:
    """Yields the section and, in the order of the schema, all sections below it."""
    yield section
    for cls in section.kinds:
        meanings = field_docstrings(cls)
        for name, info in cls.model_fields.items():
            if below := as_section(f"{section.key}.{name}" if section.key else name, info, meanings[name]):
                yield from list_sections(below)


def as_section(key: str, info: FieldInfo, meaning: str = "") -> Section | None:
    """Returns None for a field that holds a plain value. The key of a list of sections ends with []."""
    arguments = get_args(info.annotation)
    if get_origin(info.annotation) is tuple and arguments[1:] == (...,) and _models(arguments[0])[0]:
        return Section(f"{key}[]", _models(arguments[0])[0], None, False, _default_of(info), meaning)
    kinds, discriminator = _models(info.annotation)
    if not kinds:
        return None
    discriminator = info.discriminator if isinstance(info.discriminator, str) else discriminator
    nullable = NoneType in _alternatives(info.annotation)
    return Section(key, kinds, discriminator, nullable, _default_of(info), meaning)


def write_section(section: Section) -> str:
    heading = [f"### `{section.key}`\n"] if section.key else []
    lines: list[str] = []
    if len(section.kinds) == 1:
        lines += _opening(section.kinds[0])
    if section.meaning:
        lines.append(f"{section.meaning}\n")
    if section.key:
        lines += _default_line(section)
    for cls in section.kinds:
        if len(section.kinds) > 1:
            lines += [f"#### `{section.key}`, {_kind(cls, section.discriminator)}\n", *_opening(cls)]
        rows = list(_rows(section, cls))
        if rows:
            lines += ["| Key | Values | Default | Meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join([*heading, *lines]) if lines else ""


def _opening(cls: type[BaseModel]) -> list[str]:
    text = cls.__dict__.get("__doc__")
    return [f"{' '.join(text.split())}\n"] if text else []


def _default_line(section: Section) -> list[str]:
    """One line, if there is more to say of the section's default than the defaults of its keys."""
    if section.default is None:
        return ["Defaults to null: switched off.\n"]
    if len(section.kinds) > 1 and isinstance(section.default, BaseModel):
        kind = _kind(type(section.default), section.discriminator)
        return [f"Defaults to {kind}{'; null switches it off' if section.nullable else ''}.\n"]
    return ["null switches it off.\n"] if section.nullable else []


def _kind(cls: type[BaseModel], discriminator: str | None) -> str:
    if discriminator is None:
        return f"`{cls.__name__}`"
    values = get_args(cls.model_fields[discriminator].annotation)
    return " or ".join(f"`{discriminator}: {value}`" for value in values)


def _rows(section: Section, cls: type[BaseModel]) -> Iterator[str]:
    meanings = field_docstrings(cls)
    for name, info in cls.model_fields.items():
        key = f"{section.key}.{name}" if section.key else name
        if as_section(key, info) is not None:
            continue
        default = getattr(section.default, name) if isinstance(section.default, cls) else _default_of(info)
        cells = [f"`{key}`", describe_type(info.annotation, info.metadata), _shown(default), meanings[name]]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def field_docstrings(cls: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field, on one line; "" for a field without one. A base class's serve its subclasses."""
    found = dict.fromkeys(cls.model_fields, "")
    for base in reversed(cls.__mro__):
        if not issubclass(base, BaseModel) or base.__module__.startswith("pydantic"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for target, text in itertools.pairwise(body):
            if (
                isinstance(target, ast.AnnAssign)
                and isinstance(target.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[target.target.id] = " ".join(text.value.value.split())
    return found


def describe_type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """The values that a field takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        nested = [m for item in arguments[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return describe_type(arguments[0], [*nested, *metadata])
    if origin in (Union, UnionType):
        return " or ".join(describe_type(argument, metadata) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(describe_type, arguments))}]"
    if annotation is NoneType:
        return "null"
    bounds = [text for item in metadata for text in _bounds(item)]
    return " ".join([NAMES[annotation], *(["and ".join(f"{bound} " for bound in bounds).strip()] if bounds else [])])


def _bounds(item: Any) -> Iterator[str]:
    for sign, bound in (
        (">", item.gt if isinstance(item, annotated_types.Gt) else None),
        (">=", item.ge if isinstance(item, annotated_types.Ge) else None),
        ("<", item.lt if isinstance(item, annotated_types.Lt) else None),
        ("<=", item.le if isinstance(item, annotated_types.Le) else None),
    ):
        if isinstance(bound, int | float) and abs(bound) < LARGE and bound != LARGEST_INT:
            yield f"{sign} {bound:g}"


def _default_of(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    return f"`{default if isinstance(default, str | Path) else json.dumps(default)}`"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, with Annotated unions inside it opened; a type that is no union is its only member."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, UnionType):
        return tuple(member for argument in arguments for member in _alternatives(argument))
    return (annotation,)


def _models(annotation: Any) -> tuple[tuple[type[BaseModel], ...], str | None]:
    """The sections among a field's alternatives, and the discriminator of an Annotated union inside it."""
    models = tuple(a for a in _alternatives(annotation) if inspect.isclass(a) and issubclass(a, BaseModel))
    for part in (annotation, *get_args(annotation)):
        for item in get_args(part)[1:] if get_origin(part) is Annotated else ():
            if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                return models, item.discriminator
    return models, None


if __name__ == "__main__":
    PAGE.write_text(write_page())
