"""The records of a data set one after the other, each with the place that errors name.

A source is a JSONL file, a Parquet or Arrow file, a directory of these, or a data set saved by Hugging Face `datasets`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.data.files import DataError

# Hugging Face's name for one shard of a split: train-00000-of-00004.parquet
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Record:
    """Field values, where they stand (for errors), and an id made of the file's name and the line or row."""

    where: str
    id: str
    values: Mapping[str, Any]

    def field(self, name: str) -> Any:
        """Raises DataError where the field is missing or null, with the name nearest to it."""
        value = self.values.get(name)
        if value is None and name in self.values:
            raise self.error(name, "is null")
        if value is None:
            close = difflib.get_close_matches(name, self.values, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(self.values)) or 'none'}"
            raise DataError(f"{self.where}: no field {name!r}; {hint}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string, or a number as text. Raises DataError for anything else."""
        value = default if default is not None and self.values.get(name) is None else self.field(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(name, f"expected text or a number, found {type(value).__name__}")
        return str(value)

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.where}: {name}: {problem}")


def read_records(path: Path) -> Iterator[Record]:
    """Raises DataError for what is not there, not readable, or holds several splits."""
    if path.is_dir():
        yield from _rows(path, _open_directory(path))
    elif not path.is_file():
        raise DataError(f"{path}: no such file or directory; expected JSONL, Parquet, or a data set's directory")
    elif path.suffix in (".parquet", ".arrow"):
        yield from _rows(path, _open_files(path.suffix, [path]))
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            if not isinstance(values, dict):
                raise DataError(f"{where}: expected an object with fields, found {type(values).__name__}")
            yield Record(where, f"{path.name}:{number}", values)


def _rows(path: Path, rows: Any) -> Iterator[Record]:
    for number, values in enumerate(rows):
        yield Record(f"{path}: row {number}", f"{path.name}:{number}", values)


def _open_directory(path: Path) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(p.parent) for p in path.glob("*/dataset_info.json")))
        raise DataError(f"{path}: holds several splits; name one of {splits}")
    if (path / "dataset_info.json").is_file():
        try:
            return datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a saved data set: {error}") from None
    for suffix in (".parquet", ".arrow"):
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            return _open_files(suffix, files)
    raise DataError(f"{path}: no saved data set, and no Parquet or Arrow files in it")


def _open_files(suffix: str, files: list[Path]) -> Any:
    """Streamed: `datasets` would otherwise copy them into its cache, once per rank."""
    import datasets

    shards = [_SHARD.match(file.stem) for file in files]
    splits = {shard["split"] if shard else "" for shard in shards}
    if len(splits) > 1:
        raise DataError(
            f"{files[0].parent}: holds files of several splits ({', '.join(f.name for f in files)}); "
            "name one file, or give each split a directory of its own"
        )
    return datasets.load_dataset(suffix[1:], data_files=[str(file) for file in files], split="train", streaming=True)
