"""Damaged data files give correct rows or a DataError, and nothing else.

Accepted rows must equal those of an independent reader: `json` line by line, or pyarrow on a whole file at once.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from odd_data import Rows, alike, arrow_rows, parquet_rows, refusal_names, run

from megatron_rl.data.files import DataError
from megatron_rl.data.records import read_records

LINES = (
    '{"prompt": "1+1=", "answer": 2, "id": "a"}\r\n'
    '{"prompt": "h\\u00e9 \\ud83d\\ude00", "answer": 1.10e-3, "deep": [{"a": [null, true]}]}\n\n'
    '{"prompt": "é", "answer": "18446744073709551616"}\n{"prompt": "x", "answer": -0.0}\n'
)
TABLES = [
    pa.table({"prompt": ["1+1=", "é", None], "answer": ["2", "3", "4"]}),
    pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode(), "answer": pa.array([1, None, 2**40])}),
    pa.table({"prompt": ["a"] * 40, "answer": np.linspace(0, 1e-9, 40)}),
    pa.table({"answer": pa.array([Decimal("1.10"), None], pa.decimal128(9, 2)), "flag": [True, False]}),
    pa.table({"prompt": [[{"role": "user", "content": "1"}], []], "answer": pa.array([0.5, 2], pa.float32())}),
]


def jsonl(path: Path, variant: int) -> Path:
    (path / "data.jsonl").write_text(("\ufeff" if variant % 2 else "") + LINES, newline="")
    return path / "data.jsonl"


def parquet(path: Path, variant: int) -> Path:
    options = {"compression": "snappy" if variant % 2 else "none", "write_page_checksum": variant % 3 == 0}
    pq.write_table(TABLES[variant % len(TABLES)], path / "data.parquet", **options)
    return path / "data.parquet"


def arrow_file(path: Path, variant: int) -> Path:
    compression = ("uncompressed", "lz4", "zstd")[variant % 3]
    feather.write_feather(TABLES[variant % len(TABLES)], path / "data.arrow", compression=compression)
    return path / "data.arrow"


def arrow_stream(path: Path, variant: int) -> Path:
    table = TABLES[variant % len(TABLES)]
    with pa.ipc.new_stream(path / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return path / "data.arrow"


def saved(path: Path, variant: int) -> Path:
    """Saves a data set; returns the file to damage."""
    table = datasets.Dataset(TABLES[variant % len(TABLES)])
    table.with_format("numpy" if variant % 2 else None).save_to_disk(str(path / "qa"), num_shards=1 + variant % 2)
    files = sorted((path / "qa").iterdir())
    return files[variant % len(files)]


def json_rows(path: Path) -> Rows:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [json.loads(line, parse_float=Decimal) for line in lines if line.strip(b" \t\r")]


def saved_rows(path: Path) -> Rows:
    state = json.loads((path / "state.json").read_text()) if (path / "state.json").exists() else None
    names = [f["filename"] for f in state["_data_files"]] if state else sorted(p.name for p in path.glob("*.arrow"))
    return [row for name in names for row in arrow_rows(path / name)]


WRITERS: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path], Rows]]] = {
    "jsonl": (jsonl, json_rows),
    "parquet": (parquet, parquet_rows),
    "arrow_file": (arrow_file, arrow_rows),
    "arrow_stream": (arrow_stream, arrow_rows),
    "saved": (saved, saved_rows),
}

BITS = ("cut", "flip", "set", "insert", "drop", "repeat")
DAMAGE = st.lists(
    st.tuples(st.sampled_from(BITS), st.integers(0, 10**6), st.integers(1, 64), st.binary(min_size=1, max_size=8)),
    max_size=4,
)


def damaged(data: bytes, damage: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, position, length, content in damage:
        at = position % (len(data) + 1)
        changed = bytes(byte ^ 1 << length % 8 for byte in data[at : at + 1])
        data = {
            "cut": data[:at],
            "flip": data[:at] + changed + data[at + 1 :],
            "set": data[:at] + content + data[at + len(content) :],
            "insert": data[:at] + content + data[at:],
            "drop": data[:at] + data[at + length :],
            "repeat": data[:at] + data[at : at + length] * 2 + data[at + length :],
        }[kind]
    return data


def is_plain_json(path: Path) -> bool:
    """Returns whether orjson, which is strict, accepts every line as an object."""
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().split(b"\n") if line.strip(b" \t\r")]
    except orjson.JSONDecodeError:
        return False
    return all(isinstance(line, dict) for line in lines)


def check_damaged(kind: str, seen: Counter[str], tmp_path: Path) -> Callable[[int, list], None]:
    write, independent = WRITERS[kind]
    originals: dict[int, tuple[Path, Path]] = {}

    def check(variant: int, damage: list[tuple[str, int, int, bytes]]) -> None:
        if variant not in originals:
            folder = tmp_path / f"whole-{variant}"
            folder.mkdir()
            file = write(folder, variant)
            originals[variant] = folder, file
        folder, file = originals[variant]
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "now")
        target = tmp_path / "now" / file.relative_to(folder)
        target.write_bytes(damaged(target.read_bytes(), damage))
        source = target.parent if kind == "saved" else target
        try:
            found = [dict(record.values) for record in read_records(source)]
        except DataError as error:
            named = refusal_names(source, error)
            seen["refused"] += 1
            refused = str(error)
        else:
            named, refused = True, ""
            seen["accepted"] += 1
        assert named, refused
        if refused:
            assert damage
            assert kind != "jsonl" or not is_plain_json(source) or "is given twice" in refused
            return
        expected = independent(source)
        assert len(found) == len(expected)
        assert all(map(alike, found, expected)), (found, expected)

    return check


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files_are_refused_or_read_correctly(kind, seen, tmp_path):
    run(check_damaged(kind, seen, tmp_path), 40, st.integers(0, 29), DAMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_many_damaged_files_are_refused_or_read_correctly(kind, seen, tmp_path):
    run(check_damaged(kind, seen, tmp_path), 2000, st.integers(0, 29), DAMAGE)
