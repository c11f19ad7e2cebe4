"""Odd values, columns of any type, directories and specifications give correct rows or a DataError."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from odd_data import alike, arrow_rows, parquet_rows, refusal_names, run
from tiny_models import make_tokenizer

from megatron_rl.data.arithmetic_task import ArithmeticTask
from megatron_rl.data.files import DataError
from megatron_rl.data.prompts import Fields, data_digest, load_sft_samples
from megatron_rl.data.records import read_records
from megatron_rl.rewards.checked_prompts import load_prompts

# ---- odd values --------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", " ", "<eos>", "1+1=", "math", "os:system", "verifier_examples:shaped"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=6) | SCALARS}),
    max_size=3,
)
GOOD = {
    "prompt": st.sampled_from(["1+1=", "2", "a b"]),
    "answer": st.sampled_from(["2", 3, 1.5]),
    "response": st.just("2"),
}
ODD = {
    "prompt": VALUES | MESSAGES,
    "answer": VALUES,
    "response": VALUES,
    "id": VALUES,
    "verifier": VALUES,
    "other": VALUES,
}
RECORD = st.fixed_dictionaries(GOOD) | st.builds(
    lambda record, name, values: {**record, name: values[name]},
    st.fixed_dictionaries(GOOD),
    st.sampled_from(sorted(ODD)),
    st.fixed_dictionaries(ODD),
)
RECORDS = st.lists(RECORD | RECORD | RECORD | VALUES, max_size=3)
OWN = "verifier_examples:shaped"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}{{ m['content'] + '' }}{% endfor %}{{ '<eos>' if messages|length > 2 }}="
)


def check_values(seen: Counter[str], tmp_path: Path) -> Callable[[list, bool, bool], None]:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None  # unknown characters become <pad>
    tokenizer.chat_template = TEMPLATE

    def check(records: list[Any], chat: bool, ascii_only: bool) -> None:
        path = tmp_path / "data.jsonl"
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        assert data_digest(str(path)) == data_digest(str(path))
        for load, field in ((load_prompts, "answer"), (load_sft_samples, "response")):
            loaded: Any
            try:
                loaded = load(str(path), Fields("prompt", field, OWN, chat), tokenizer, 60)
            except DataError as error:
                loaded, named = None, refusal_names(path, error)
            seen["refused" if loaded is None else "accepted"] += 1
            if loaded is None:
                assert named
                continue
            assert len(loaded) == len(records)
            for record, one in zip(records, loaded, strict=True):
                check_used(record, one if load is load_prompts else one.prompt, chat)

    return check


def check_used(record: dict[str, Any], prompt: Any, chat: bool) -> None:
    if prompt.verifier:  # only RL prompts have a verifier and an answer
        answer = record["answer"]
        assert prompt.answer == (answer if isinstance(answer, str) else json.dumps(answer))
        assert prompt.verifier == (record.get("verifier") or OWN)
        assert prompt.verifier in ("math", "arithmetic", OWN)
    text = record["prompt"]
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    assert prompt.text == parts[0] if not chat else all(part in prompt.text for part in parts)
    assert prompt.token_ids
    assert prompt.token_ids[-1] != 1


def test_odd_values(seen, tmp_path):
    run(check_values(seen, tmp_path), 40, RECORDS, st.booleans(), st.booleans())


@pytest.mark.slow
def test_many_odd_values_are_refused_or_read_correctly(seen, tmp_path):
    run(check_values(seen, tmp_path), 3000, RECORDS, st.booleans(), st.booleans())


# ---- columns of any type -----------------------------------------------------------------------------------------

COLUMNS = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(),
        pa.decimal128(38, 10), pa.decimal256(60, 0), pa.binary(), pa.date32(), pa.timestamp("us"), pa.duration("s"),
        pa.list_(pa.string()), pa.struct([("role", pa.string()), ("content", pa.float64())]), pa.null(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.float32()), pa.map_(pa.string(), pa.int8()),
    ]
)  # fmt: skip


def column(data: st.DataObject, kind: pa.DataType, rows: int) -> pa.Array:
    """Returns a column of random bytes and nulls. It may contain dates and texts that readers reject."""
    if pa.types.is_dictionary(kind):
        return column(data, kind.value_type, rows).dictionary_encode().cast(kind)
    if pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        width = max(kind.bit_width // 8, 1)
        content = pa.py_buffer(data.draw(st.binary(min_size=rows * width, max_size=rows * width)))
        valid = pa.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), pa.bool_()).buffers()[1]
        return pa.Array.from_buffers(kind, rows, [valid, content])
    values = {"struct": {"role": "user", "content": 0.5}, "map": [("a", 1)], "list": ["a"]}
    value = next((v for name, v in values.items() if str(kind).startswith(name)), None)
    if value is None and not pa.types.is_null(kind):
        texts = data.draw(st.lists(st.none() | st.text(max_size=5), min_size=rows, max_size=rows))
        return pa.array([t.encode() if t and pa.types.is_binary(kind) else t for t in texts], kind)
    return pa.array([value] * rows, kind)


def check_columns(seen: Counter[str], tmp_path: Path) -> Callable[[st.DataObject], None]:
    def check(data: st.DataObject) -> None:
        kinds = data.draw(st.dictionaries(st.sampled_from(["prompt", "answer", "other"]), COLUMNS, max_size=3))
        rows = data.draw(st.integers(0, 4))
        table = pa.table({name: column(data, kind, rows) for name, kind in kinds.items()})
        write = data.draw(st.sampled_from(["parquet", "arrow"]))
        path = tmp_path / f"data.{write}"
        try:
            if write == "parquet":
                pq.write_table(table, path)
            else:
                feather.write_feather(table, path, compression="uncompressed")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
            return  # the writer does not know the type, or the table has no columns
        try:
            found = [dict(record.values) for record in read_records(path)]
        except DataError as error:
            found, named = None, refusal_names(path, error)
        seen["refused" if found is None else "accepted"] += 1
        if found is None:
            assert named
            return
        expected = (parquet_rows if write == "parquet" else arrow_rows)(path)
        assert len(found) == len(expected) == rows
        assert all(map(alike, found, expected)), (found, expected)
        for name in kinds:
            assert [record.values for record in read_records(path, {name})] == [{name: row[name]} for row in found]

    return check


def test_columns_of_any_type(seen, tmp_path):
    run(check_columns(seen, tmp_path), 60, st.data())


@pytest.mark.slow
def test_many_columns_of_any_type_are_refused_or_read_correctly(seen, tmp_path):
    run(check_columns(seen, tmp_path), 3000, st.data())


# ---- directories and specifications ------------------------------------------------------------------------------

NAMES = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["train", "test", "data", "gsm8k_val", ".train", "_SUCCESS", "sub/train", "x-dev"]),
        st.sampled_from(["", "-00000-of-00001", "-00000-of-00002", "-00001-of-00002", "_1", "_2"]),
        st.sampled_from([".jsonl", ".jsonl", ".parquet", ".arrow", ".jsonl.part", ".jsonl.gz", ".txt", ""]),
    ),
    min_size=1,
    max_size=3,
    unique=True,
)


def check_directories(seen: Counter[str], tmp_path: Path) -> Callable[[list[str]], None]:
    def check(names: list[str]) -> None:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        for name in names:
            path = tmp_path / "d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pq.write_table(pa.table({"prompt": [name]}), path)
            elif path.suffix == ".arrow":
                feather.write_feather(pa.table({"prompt": [name]}), path)
            else:
                path.write_text(json.dumps({"prompt": name}) + "\n")
        try:
            found = [record.values["prompt"] for record in read_records(tmp_path / "d")]
        except DataError as error:
            found, named = None, refusal_names(tmp_path / "d", error)
        seen["refused" if found is None else "accepted"] += 1
        if found is None:
            assert named
            return
        there = [n for n in names if not n.startswith((".", "_")) and not n.endswith((".txt", "/")) and "." in n]
        assert found == sorted(there)
        assert len({word for name in there for word in ("train", "test", "val", "dev") if word in name}) <= 1
        assert len({name.partition("-of-")[2][:5] for name in there}) == 1
        shards = [name for name in there if "-of-" in name]
        assert not shards or len(shards) == int(shards[0].partition("-of-")[2][:5])

    return check


def test_random_directories_are_refused_or_read_correctly(seen, tmp_path):
    run(check_directories(seen, tmp_path), 60, NAMES)


@pytest.mark.slow
def test_many_random_directories_are_refused_or_read_correctly(seen, tmp_path):
    run(check_directories(seen, tmp_path), 3000, NAMES)


SPECS = st.lists(
    st.sampled_from(["terms=5", "count=07", "seed=3", "split=heldout", "split=train", "terms=1000"])
    | st.builds(
        "{}{}{}".format,
        st.sampled_from(["terms", "split", "count", "seed", "term", ""]),
        st.sampled_from(["=", "=", "==", ""]),
        st.sampled_from(["train", "0", "1", "-1", "9" * 30, "1e3", "٣", "\0"]) | st.text(max_size=4),
    ),
    max_size=3,
).map(",".join)


def test_random_arithmetic_specifications_are_refused_or_read_correctly(seen):
    def check(spec: str) -> None:
        try:
            task = ArithmeticTask.parse(f"arithmetic:{spec}")
        except DataError:
            seen["refused"] += 1
            return
        seen["accepted"] += 1
        written = dict(part.split("=") for part in spec.split(",") if part)
        assert all(str(getattr(task, key)) == (value.lstrip("0") or value[:1]) for key, value in written.items())

    run(check, 100, SPECS)
