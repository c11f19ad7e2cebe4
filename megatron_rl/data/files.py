"""Finds the files of a data set, in reading order.

A source is one file, a directory with the files of one split, or a directory written by `save_to_disk` of Hugging Face
`datasets`. A source that could be read in two ways is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_rl.errors import UserError

Kind = Literal["json", "parquet", "arrow"]

SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
}
EXPECTED = "expected JSONL, Parquet, or a data set's directory"
NESTED_LEVELS = 3  # depth of the search for splits below a directory
SHOWN = 8  # names in one error

# Hugging Face's name for one shard of a split: train-00000-of-00004.parquet. Older ones end with a hash.
_SHARD = re.compile(r"(?P<base>.*?)[-_.]?(?P<index>\d+)[-_]of[-_](?P<total>\d+)(-[0-9a-f]{16})?")
_SPLIT = re.compile(
    r"(?<![a-z])(train|training|trainset|test|testing|testset|valid|validation|val|dev|eval|evaluation|held[-_]?out"
    r"|hold[-_]?out)(?![a-z])"
)
_PACKED = re.compile(r"\.(gz|zst|bz2|xz|zip|lz4)$")
_UNFINISHED = re.compile(r"\.(incomplete|partial|part|tmp|temp|crdownload|download|aria2)$")

# First bytes of a file, and the kind of file that begins with them.
_CONTENT = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; fetch the data with `git lfs pull`"),
    (b"PAR1", "holds Parquet data; name it *.parquet"),
    (b"ARROW1", "holds Arrow data; name it *.arrow"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it with unzstd"),
    (b"BZh", "is compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it with unxz"),
    (b"PK\x03\x04", "is a zip archive; unpack it with unzip"),
)
_OWN: dict[Kind, bytes] = {"json": b"", "parquet": b"PAR1", "arrow": b"ARROW1"}


class DataError(UserError):
    """The data set or a record cannot be used. Names the file, the line or row, and the field."""


@dataclass(frozen=True)
class DataFiles:
    """Files of one data set, all of one kind, in reading order."""

    kind: Kind
    paths: tuple[Path, ...]
    saved: bool = False  # written by save_to_disk: rows are counted over all files

    def digest(self) -> str:
        """sha256 of the files' bytes in reading order. Names and directories of files do not count."""
        whole = hashlib.sha256(self.kind.encode())
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(path, error) from None
        return whole.hexdigest()


def find_files(path: Path) -> DataFiles:
    """Files of the data set at `source`.

    Raises DataError if there is no data, or if it could be read in two ways: several splits or formats, missing or
    repeated shards, unfinished downloads.
    """
    try:
        if path.is_dir():
            return _directory(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file or directory; {EXPECTED}")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise unreadable(path, error) from None
    kind = SUFFIXES.get(path.suffix.lower(), "json")
    check_content(path, kind)
    return DataFiles(kind, (path,))


def check_content(path: Path, kind: Kind) -> None:
    """Raises DataError if the file is empty or begins like a file of another kind."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise unreadable(path, error) from None
    if not start and kind != "json":
        raise DataError(f"{path}: is empty; it was not copied or downloaded whole")
    for magic, problem in _CONTENT:
        if start.startswith(magic) and magic != _OWN[kind]:
            raise DataError(f"{path}: {problem}")


def unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else None
    text = str(path)
    shown = text if len(text) <= 300 else f"{text[:300]}..."
    return DataError(f"{shown!r}: cannot be read: {reason or error}")


def _directory(path: Path) -> DataFiles:
    if (path / "dataset_dict.json").is_file():
        raise DataError(f"{path}: holds several splits; name one of {some(sorted(_folders(path, 1)))}")
    if (path / "state.json").is_file():
        return _saved(path)
    files = _data_files(path)
    nested = sorted(folder for folder in _folders(path, NESTED_LEVELS) if _has_data(folder))
    if nested:
        there = "holds data files, and folders with more" if files else "holds its data in folders"
        raise DataError(f"{path}: {there}; name one of {some(nested)}{', or a file' if files else ''}")
    if not files:
        others = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
        hint = f"; it has {some(others)}" if others else ""
        raise DataError(f"{path}: no saved data set, and no Parquet or Arrow or JSONL files in it{hint}")
    kinds = sorted({SUFFIXES[file.suffix.lower()] for file in files})
    if len(kinds) > 1:
        raise DataError(f"{path}: holds files of several formats ({some(f.name for f in files)}); name one file")
    _check_one_split(path, files)
    for file in files:
        check_content(file, kinds[0])
    return DataFiles(kinds[0], tuple(files))


def _saved(path: Path) -> DataFiles:
    """Files that `save_to_disk` wrote.

    The saved format, such as numpy or a choice of columns, only says how `datasets` returns rows, so it is ignored.
    """
    state_file = path / "state.json"
    try:
        state = orjson.loads(state_file.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        if not all(isinstance(name, str) and name and name == Path(name).name for name in names):
            raise ValueError("a file name that is not one of this directory")
        indices = state.get("_indices_files") or state.get("_indices_data_files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{state_file}: not the state of a saved data set ({type(error).__name__}: {error})") from None
    if indices:
        raise DataError(f"{path}: saved with indices by an old version of `datasets`; save it with a newer one")
    files = tuple(path / name for name in names)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file, but {state_file.name} names it; the data set was not copied whole")
        check_content(file, "arrow")
    return DataFiles("arrow", files, saved=True)


def _data_files(path: Path) -> list[Path]:
    """Data files of the directory, sorted by name. Raises DataError for a packed or unfinished file."""
    files = []
    for file in sorted(path.iterdir()):
        if not _is_data(file) or file.is_dir():
            continue
        if _UNFINISHED.search(file.name):
            raise DataError(f"{file}: is an unfinished download; finish it, or delete the file")
        if _PACKED.search(file.name):
            raise DataError(f"{file}: is compressed; unpack it")
        if not file.is_file():
            raise DataError(f"{file}: links to a file that is not there")
        files.append(file)
    return files


def _is_data(file: Path) -> bool:
    """Whether the name has a suffix of data, which packed and unfinished files may have too.

    Names that begin with '.' or '_' are not data, as for Spark and Arrow.
    """
    whole = _PACKED.sub("", _UNFINISHED.sub("", file.name))
    return Path(whole).suffix.lower() in SUFFIXES and not file.name.startswith((".", "_"))


def _folders(path: Path, levels: int) -> Iterator[Path]:
    for folder in path.iterdir() if levels else ():
        if folder.is_dir() and not folder.name.startswith((".", "_")):
            yield folder
            yield from _folders(folder, levels - 1)


def _has_data(folder: Path) -> bool:
    return any(map(_is_data, folder.iterdir()))


def _check_one_split(path: Path, files: Sequence[Path]) -> None:
    """Raises DataError if the files belong to several splits, or if a shard is missing or repeated."""
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    names = {
        (shard["base"] if shard else "", *sorted(set(_split_words(file))))
        for shard, file in zip(shards, files, strict=True)
    }
    if len(names) > 1:
        raise DataError(
            f"{path}: holds files of several splits ({some(f.name for f in files)}); "
            "name one file, or give each split a directory of its own"
        )
    sets: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    for shard, file in zip(shards, files, strict=True):
        if shard:
            sets[int(shard["total"])].append((int(shard["index"]), file))
    if len(sets) > 1 or (sets and not all(shards)):
        raise DataError(f"{path}: holds several sets of shards ({some(f.name for f in files)}); delete the old ones")
    for total, members in sets.items():
        _check_complete(path, total, members)


def _check_complete(path: Path, total: int, members: Sequence[tuple[int, Path]]) -> None:
    by_index: dict[int, Path] = {}
    for index, file in members:
        if index in by_index:
            raise DataError(f"{path}: holds shard {index} twice ({by_index[index].name}, {file.name}); delete one")
        by_index[index] = file
    first = 1 if total in by_index and 0 not in by_index else 0
    missing = (index for index in range(first, first + total) if index not in by_index)
    names = some(_with_index(members[0][1], index) for index in missing)
    if names or len(by_index) > total:
        problem = f"without {names}" if names else "numbered beyond the last"
        raise DataError(f"{path}: holds {len(by_index)} of {total} shards, {problem}; copy the data set whole")


def _with_index(file: Path, index: int) -> str:
    shard = _SHARD.fullmatch(file.stem)
    assert shard is not None
    start, end = shard.span("index")
    return f"{file.name[:start]}{index:0{end - start}d}{file.name[end:]}"


def _split_words(file: Path) -> list[str]:
    return _SPLIT.findall(file.stem.lower())


def some(names: Any) -> str:
    shown = [str(name) for name in itertools.islice(names, SHOWN + 1)]
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
