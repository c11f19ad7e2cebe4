"""Parquet and Arrow files: correct values as text, only requested columns, and one error for damaged files."""

from __future__ import annotations

import decimal
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from megatron_rl.data.files import DataError
from megatron_rl.data.records import read_records

TABLE = pa.table({"prompt": ["a", "b", "c"], "answer": ["1", "2", "3"]})


def write_parquet(table: pa.Table, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_arrow_file(table: pa.Table, path: Path) -> Path:
    feather.write_feather(table, path.with_suffix(".arrow"), compression="uncompressed")
    return path.with_suffix(".arrow")


def write_arrow_stream(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return path.with_suffix(".arrow")


WRITERS = [write_parquet, write_arrow_file, write_arrow_stream]


def answers(column: pa.Array, write, tmp_path: Path) -> list[str]:
    return [record.text("answer") for record in read_records(write(pa.table({"answer": column}), tmp_path / "data"))]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([1, 2**62, -3]), ["1", str(2**62), "-3"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([18.0, 0.1, 1e-5, 6.02e23, 1e16]), ["18", "0.1", "0.00001", "602" + "0" * 21, "1" + "0" * 16]),
        (pa.array([0.1, 1e-5, 16777216.0], pa.float32()), ["0.1", "0.00001", "16777216"]),
        (pa.array(np.array([0.1, 2.0], np.float16)), ["0.1", "2"]),
        (
            pa.array([decimal.Decimal("1.10"), decimal.Decimal("1E-7")], pa.decimal128(20, 8)),
            ["1.10000000", "0.00000010"],
        ),
        (pa.array([decimal.Decimal(10) ** 60], pa.decimal256(70, 0)), ["1" + "0" * 60]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array([1.5, 2.0, 1.5]).dictionary_encode(), ["1.5", "2", "1.5"]),
        (pa.array(["x"], pa.large_string()), ["x"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_a_number_is_read_as_text_without_exponent(tmp_path, write, column, texts):
    assert answers(column, write, tmp_path) == texts


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array([None], pa.int64()), "is null"),
        (pa.array([float("nan")]), "is null"),
        (pa.array([float("-inf")]), "expected text or a finite number, found -inf"),
        (pa.array([b"x"]), "expected text or a number, found bytes"),
        (pa.array([True]), "expected text or a number, found true or false"),
        (pa.array([["x"]]), "expected text or a number, found a list"),
    ],
    ids=str,
)
def test_the_error_names_the_row_of_an_unusable_answer(tmp_path, column, found):
    with pytest.raises(DataError, match=rf"data\.parquet: row 0: answer: {found}"):
        answers(column, write_parquet, tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_rows_come_in_order_with_their_location(tmp_path, write):
    path = write(TABLE, tmp_path / "data")
    records = list(read_records(path))
    assert [dict(record.values) for record in records] == TABLE.to_pylist()
    assert [record.where for record in records] == [f"{path}: row {i}" for i in range(3)]
    assert [record.id for record in records] == [f"{path.name}:{i}" for i in range(3)]


@pytest.mark.parametrize("write", WRITERS)
def test_only_requested_columns_are_read(tmp_path, write):
    records = list(read_records(write(TABLE, tmp_path / "data"), {"answer", "verifier"}))
    assert [dict(record.values) for record in records] == [{"answer": text} for text in "123"]
    with pytest.raises(DataError, match=r"row 0: no field 'promt'; did you mean 'prompt'\?"):
        next(read_records(write(TABLE, tmp_path / "data"), {"promt"})).field("promt")


def test_a_media_column_is_not_decoded(tmp_path):
    """Hugging Face's readers would decode it with torchcodec or PIL."""
    value = {"dtype": "string", "_type": "Value"}
    media = pa.array([{"bytes": b"RIFF", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for kind in ("Audio", "Image", "Video"):
        features = {"prompt": value, "answer": value, "media": {"_type": kind}}
        notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = pa.table({"prompt": ["a"], "answer": ["1"], "media": media}).replace_schema_metadata(notes)
        (record,) = read_records(write_parquet(table, tmp_path / kind), {"prompt", "answer"})
        assert record.values == {"prompt": "a", "answer": "1"}


@pytest.mark.parametrize("form", ["numpy", "torch", "arrow", "columns"])
def test_a_saved_data_set_is_read_the_same_with_any_format_setting(tmp_path, form):
    rows = datasets.Dataset.from_dict({"prompt": ["q1", "q2"], "answer": [1, 2]})
    rows = rows.with_format("python", columns=["prompt"]) if form == "columns" else rows.with_format(form)
    rows.save_to_disk(str(tmp_path / form))
    assert [(r.field("prompt"), r.text("answer")) for r in read_records(tmp_path / form)] == [("q1", "1"), ("q2", "2")]


def test_objects_stored_as_json_text_are_read_as_objects(tmp_path):
    features = datasets.Features({"prompt": datasets.List(datasets.Json()), "extra": datasets.Json()})
    messages = [{"role": "user", "content": "1+1="}, {"role": "user", "content": "2", "n": 3}]
    rows = datasets.Dataset.from_dict({"prompt": [messages, None], "extra": [{"a": [1]}, None]}, features=features)
    rows.to_parquet(str(tmp_path / "data.parquet"))
    first, second = read_records(tmp_path / "data.parquet")
    assert first.values == {"prompt": messages, "extra": {"a": [1]}}
    assert second.values == {"prompt": None, "extra": None}


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_the_error_names_a_truncated_file(tmp_path, write, share):
    path = write(TABLE, tmp_path / "data")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"data{path.suffix}: "):
        list(read_records(path))


def test_the_error_names_a_stream_truncated_between_batches(tmp_path):
    """pyarrow would read it as a shorter stream."""
    path = write_arrow_stream(TABLE, tmp_path / "data")
    with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
        reader.read_next_batch()
        end_of_first = file.tell()
    path.write_bytes(path.read_bytes()[:end_of_first])
    with pytest.raises(DataError, match=r"data\.arrow: does not end as an Arrow stream does"):
        list(read_records(path))


@pytest.mark.parametrize("write", WRITERS)
def test_the_error_names_a_file_without_rows_or_with_invalid_text(tmp_path, write):
    with pytest.raises(DataError, match=r"data\..*: has no rows"):
        list(read_records(write(TABLE.slice(0, 0), tmp_path / "data")))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    path = write(pa.table({"prompt": broken}), tmp_path / "broken")
    with pytest.raises(DataError, match=rf"broken{path.suffix}: .*UTF8"):
        list(read_records(path))


def test_pages_are_checked_if_they_have_a_checksum(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(TABLE, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"\1\0\0\0b\1\0\0\0c") + 4] = ord("x")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"data\.parquet: .*CRC"):
        list(read_records(path))


def test_the_error_names_a_duplicate_column(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(DataError, match=r"data\.arrow: has two columns 'prompt'"):
        list(read_records(write_arrow_file(table, tmp_path / "data")))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": ["c"], "solution": ["3"]}, r"2\.parquet: has no column 'answer', but 1\.parquet has"),
        ({"prompt": ["c"], "answer": [3]}, r"2\.parquet: column 'answer' holds numbers, but in 1\.parquet text"),
        ({"prompt": ["c"], "answer": ["3"], "id": ["x"]}, r"1\.parquet: has no column 'id', but 2\.parquet has"),
    ],
)
def test_the_error_names_shards_with_different_columns(tmp_path, second, message):
    write_parquet(TABLE, tmp_path / "1")
    write_parquet(pa.table(second), tmp_path / "2")
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path))


def test_shards_may_differ_in_unread_columns_and_type_widths(tmp_path):
    write_parquet(pa.table({"answer": pa.array([1], pa.int32()), "note": [1]}), tmp_path / "1")
    write_parquet(pa.table({"answer": pa.array([2.5]), "other": ["x"]}), tmp_path / "2")
    write_parquet(pa.table({"answer": pa.array([None], pa.null())}), tmp_path / "3")
    records = list(read_records(tmp_path, {"answer"}))
    assert [number_or_none(record) for record in records] == ["1", "2.5", None]


def number_or_none(record) -> str | None:
    return None if record.values["answer"] is None else record.text("answer")
