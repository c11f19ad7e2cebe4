"""The JSON files of a model directory, read strictly. Importable without torch.

Every field is understood, or is in a list of fields known not to matter, or is an error: a field passed over in silence
would be a model trained as something that it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.errors import MissingFileError, UserError

MAX_SHOWN = 100
"""Characters of a value in an error."""
MAX_LISTED = 10
MAX_INTEGER = 10**9
LARGEST_NUMBER = 1e38  # that of float32, in round figures


class ModelError(UserError, ValueError):
    """A model directory that cannot be read as what its config.json says; names the file and the field or tensor."""


class MissingModelError(ModelError, MissingFileError):
    """A model directory, or a file that belongs in it, that is not there."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Raises ModelError for anything else, and for a key given twice.

    Raises MissingModelError when there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(path, pairs))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingModelError(f"{path} does not exist; expected a Hugging Face model directory with it") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ModelError:
        raise
    except RecursionError:
        raise ModelError(f"{path} is not valid JSON: nested too deep") from None
    except ValueError as error:  # also text that is not UTF-8, and integers of thousands of digits
        raise ModelError(f"{path} is not valid JSON: {str(error)[:MAX_SHOWN]}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; found a {type(content).__name__}")
    return content


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{path}: {twice[:MAX_SHOWN]} is given twice; keep one")
    return content


class JsonFields:
    """The fields of one JSON object; each is taken once, and what is left at the end was not understood."""

    def __init__(self, path: Path, content: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.left = dict(content)
        self.prefix = prefix

    def error(self, name: str, found: object, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {self.prefix}{name} is {_shown(found)}; expected {expected}")

    def take(self, name: str, default: Any) -> Any:
        if name in self.left:
            return self.left.pop(name)
        if default is None:
            raise ModelError(f"{self.path}: {self.prefix}{name} is missing, and it has no safe default; add it")
        return default

    def integer(self, name: str, default: int | None = None, largest: int = MAX_INTEGER, least: int = 1) -> int:
        value = self.take(name, default)
        if type(value) is not int or value < least:
            raise self.error(name, value, f"an integer of at least {least}")
        if value > largest:
            raise self.error(name, value, f"an integer of at most {largest}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise self.error(name, value, f"a number above 0 and below {LARGEST_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self.take(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def enter(self, name: str, inert: Mapping[str, tuple[Any, ...]]) -> None:
        """Goes on with the fields of the object `name`, if all that are left beside it are `inert`: see `end`."""
        inner = self.take(name, None)
        if not isinstance(inner, dict):
            raise self.error(name, inner, "an object")
        self.end(inert)
        self.left, self.prefix = dict(inner), f"{self.prefix}{name}."

    def must_be(self, name: str, *allowed: Any) -> None:
        """Takes a field that may be absent, and otherwise has one of these values."""
        value = self.left.pop(name, allowed[0])
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            raise self.error(name, value, f"{choices}; no other value is supported")

    def end(self, inert: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Raises ModelError if a field is left that is not `inert`: those change nothing in the model, whatever their
        value, or, if values are given, with these."""
        for name, values in (inert or {}).items():
            if values:
                self.must_be(name, *values)
            else:
                self.left.pop(name, None)
        if self.left:
            fields = [f"{self.prefix}{name} = {json.dumps(value)}" for name, value in self.left.items()]
            listed = ", ".join(map(cut, fields[:MAX_LISTED]))
            listed += f" and {len(fields) - MAX_LISTED} more" if len(fields) > MAX_LISTED else ""
            raise ModelError(
                f"{self.path}: not understood: {listed}; if it changes nothing in the model, remove it there"
            )


def _shown(value: object) -> str:
    """The beginning of a value; an object's short entries come first."""
    if isinstance(value, dict):
        value = dict(sorted(value.items(), key=lambda entry: isinstance(entry[1], dict | list)))
    return cut(repr(value))


def cut(text: str) -> str:
    """The beginning of a text that an error shows."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
