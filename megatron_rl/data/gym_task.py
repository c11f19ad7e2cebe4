"""Problems of the package reasoning-gym, about 100 generators, each with its own verifier.

    reasoning-gym:basic_arithmetic,size=1000,seed=0,max_terms=4

A problem is made again from its specification and its number, so its verifier has all that it needs from the prompt's
id.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.files import DataError

PREFIX = "reasoning-gym:"
SIZE, SEED = 1000, 0
LARGEST_SIZE = 10_000_000

Setting = int | float | bool | str


@dataclass(frozen=True)
class GymTask:
    name: str
    """The generator's."""
    size: int
    seed: int
    settings: tuple[tuple[str, Setting], ...]
    """The generator's own, in the order of their names."""

    @classmethod
    def parse(cls, spec: str) -> GymTask:
        """Raises DataError. The generator checks its name and settings when it is made."""
        shown = spec if len(spec) <= 200 else f"{spec[:200]}..."
        name, *parts = spec.removeprefix(PREFIX).split(",")
        if not name.isidentifier():
            raise DataError(f"{shown}: expected the name of a generator after {PREFIX}, found {name[:40]!r}")
        values: dict[str, Setting] = {"size": SIZE, "seed": SEED}
        given: set[str] = set()
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key.isidentifier() or not value:
                raise DataError(f"{shown}: expected key=value, found {part[:40]!r}")
            if key in given:
                raise DataError(f"{shown}: {key}: given twice")
            given.add(key)
            values[key] = _read(value)
        for key, least in (("size", 1), ("seed", 0)):
            if type(values[key]) is not int or not least <= int(values[key]) <= LARGEST_SIZE:
                raise DataError(f"{shown}: {key}: expected {least} to {LARGEST_SIZE}, found {values[key]!r}")
        size, seed = int(values.pop("size")), int(values.pop("seed"))
        return cls(name, size, seed, tuple(sorted(values.items())))

    def make(self) -> Any:
        """The package's data set. Raises DataError if the package is missing or refuses the specification."""
        gym, names = _package()
        if self.name not in names:
            close = difflib.get_close_matches(self.name, names, n=3) or names[:5]
            raise DataError(
                f"{PREFIX}{self.name}: no such generator; there are {len(names)}, such as {', '.join(close)}"
            )
        try:
            return gym.create_dataset(self.name, size=self.size, seed=self.seed, **dict(self.settings))
        except Exception as error:  # generators check their settings with assert
            raise DataError(f"{PREFIX}{self.name}: {error or type(error).__name__}") from None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields question and reference answer; the answer is empty if many are right. Raises DataError."""
        made = self.make()
        for number in range(self.size):
            item = made[number]
            yield item["question"], str(item["answer"] or "")


def version() -> str:
    """The package's version. Raises DataError if it is missing."""
    _package()
    return importlib.metadata.version("reasoning-gym")


def _package() -> tuple[Any, list[str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"{PREFIX} needs the package reasoning-gym ({error}): pip install 'megatron_rl[environments]'"
        ) from None
    return reasoning_gym, sorted(DATASETS)


def _read(value: str) -> Setting:
    if value in ("true", "false"):
        return value == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value
