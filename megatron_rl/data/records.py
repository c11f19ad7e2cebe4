"""Reads the records of a data set one by one, each with the place that errors name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_rl.data.files import DataError, find_files
from megatron_rl.data.json_lines import read_json_lines
from megatron_rl.data.numbers import Real, number_text
from megatron_rl.data.tables import read_tables

# Names of types in errors. Other types keep their Python name.
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Record:
    """Field values, their place (for errors), and an id made of the file's name and the line or row."""

    where: str
    id: str
    values: Mapping[str, Any]
    names: Collection[str] = ()  # all fields of the source, if `values` has only some

    def field(self, name: str) -> Any:
        """Raises DataError if the field is missing or null; the error suggests the most similar name."""
        value = self.values.get(name)
        if value is None and name in self.values:
            raise self.error(name, "is null")
        if value is None:
            names = self.names or self.values
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names)) or 'none'}"
            raise DataError(f"{self.where}: no field {name!r}; {hint}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """The field's string, or its number as data.numbers writes it. Raises DataError for anything else."""
        value = default if default is not None and self.values.get(name) is None else self.field(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(name, f"expected text or a number, found {kind_of(value)}")
        try:
            text = value if isinstance(value, str) else number_text(value)
        except ValueError:  # a whole number with more digits than Python writes
            raise self.error(name, "has too many digits; give it as text") from None
        if isinstance(value, float) and text.strip("-") in ("inf", "nan"):
            raise self.error(name, f"expected text or a finite number, found {text}")
        return text

    def plain(self) -> dict[str, Any]:
        """All fields as JSON has them. Raises DataError for a value such as bytes, which JSON has not."""
        return {name: _plain(value, self, name) for name, value in self.values.items()}

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.where}: {name}: {problem}")


def kind_of(value: object) -> str:
    return next((name for kind, name in _KINDS.items() if type(value) is kind), type(value).__name__)


def _plain(value: Any, record: Record, name: str) -> Any:
    match value:
        case Real() | Decimal():
            return float(value)
        case int() if value.bit_length() > 63:
            raise record.error(name, "is beyond the integers of 64 bits; give it as text")
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(each, record, name) for each in value]
        case dict():
            return {str(key): _plain(each, record, name) for key, each in value.items()}
        case date() | time():
            return value.isoformat()
    raise record.error(
        name,
        f"is of type {type(value).__name__}, which no verifier can be given as part of the record; take the column "
        "out, or have the verifier ask for the prompt alone",
    )


def read_records(path: Path, fields: Collection[str] | None = None) -> Iterator[Record]:
    """Yields the records of a file or directory (see megatron_rl.data.files).

    From Parquet and Arrow only the columns in `fields` are read. Defaults to all.

    Raises DataError if the source is missing, unreadable, has several splits, or has no rows.
    """
    files = find_files(path)
    if files.kind == "json":
        for file in files.paths:
            for line, values in read_json_lines(file):
                yield Record(f"{file}:{line}", f"{file.name}:{line}", values)
        return
    rows = 0
    for file, row, values, names in read_tables(files.paths, files.kind, fields):
        # If a data set was saved in parts, rows are counted over all parts, as `datasets` does.
        place, number = (path, rows) if files.saved else (file, row)
        yield Record(f"{place}: row {number}", f"{place.name}:{number}", values, names)
        rows += 1
    if not rows:
        raise DataError(f"{path}: has no rows")
