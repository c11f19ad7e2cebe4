"""How the sections of the schema nest, and which of them come in kinds. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from megatron_rl.config.bounds import Frozen


@dataclass(frozen=True)
class Kinds:
    """A section whose keys depend on its kind, which one of its keys names."""

    name: str
    """The key that names the kind: `kind` or `estimator`."""
    default: str
    members: Mapping[str, type[Frozen]]

    def having(self, key: str) -> list[str]:
        """The kinds that read the key."""
        return [kind for kind, member in self.members.items() if key in member.model_fields]


def sections(cls: type[Frozen], *, optional: bool = False) -> Iterator[tuple[str, type[Frozen]]]:
    """Required sections; with `optional`, nullable ones and those that come in kinds too, once for each class."""
    for name, info in cls.model_fields.items():
        for annotation in (info.annotation, *(get_args(info.annotation) if optional else ())):
            if isinstance(annotation, type) and issubclass(annotation, Frozen):
                yield name, annotation


def all_keys(cls: type[Frozen], prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections among them; a key that several kinds have comes once for each."""
    yield from (prefix + name for name in cls.model_fields)
    for name, section in sections(cls, optional=True):
        yield from all_keys(section, f"{prefix}{name}.")


def sections_of_kinds(cls: type[Frozen], prefix: str = "") -> dict[str, Kinds]:
    """The sections that come in kinds, by dotted key."""
    found = {}
    for name, info in cls.model_fields.items():
        if isinstance(info.discriminator, str):
            members = {
                kind: member
                for member in get_args(info.annotation)
                for kind in get_args(member.model_fields[info.discriminator].annotation)
            }
            default = getattr(info.default, info.discriminator)
            found[prefix + name] = Kinds(info.discriminator, default, members)
    for name, section in sections(cls):
        found |= sections_of_kinds(section, f"{prefix}{name}.")
    return found
