"""Damaged and odd data sets: right rows or DataError, and nothing else.

What is accepted must equal what an independent reader sees: `json` line by line, or pyarrow with a whole file at once.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_tokenizer

from megatron_rl.data.arithmetic_task import ArithmeticTask
from megatron_rl.data.files import DataError
from megatron_rl.data.numbers import Real
from megatron_rl.data.prompts import Fields, data_digest, load_sft_samples
from megatron_rl.data.records import read_records
from megatron_rl.rewards.checked_prompts import load_prompts

Rows = list[dict[str, Any]]

# ---- damaged bytes -----------------------------------------------------------------------------------------------

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
    """Returns the file of it that is to be damaged."""
    table = datasets.Dataset(TABLES[variant % len(TABLES)])
    table.with_format("numpy" if variant % 2 else None).save_to_disk(str(path / "qa"), num_shards=1 + variant % 2)
    files = sorted((path / "qa").iterdir())
    return files[variant % len(files)]


def json_rows(path: Path) -> Rows:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [json.loads(line, parse_float=Decimal) for line in lines if line.strip(b" \t\r")]


def parquet_rows(path: Path) -> Rows:
    return pq.read_table(path).to_pylist()


def arrow_rows(path: Path) -> Rows:
    data = path.read_bytes()
    return (pa.ipc.open_file(data) if data.startswith(b"ARROW1") else pa.ipc.open_stream(data)).read_all().to_pylist()


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


def alike(ours: Any, theirs: Any) -> bool:
    """Whether values are equal: of JSON `theirs` has Decimal for digits, of a table it is widened from its type."""
    if isinstance(ours, Real):
        if isinstance(theirs, Decimal):
            return Decimal(ours.text) == theirs
        return "e" not in ours.text and any(np.dtype(width).type(ours) == theirs for width in ("f8", "f4", "f2"))
    if isinstance(theirs, float) and theirs != theirs:  # a missing number
        return ours is None or ours != ours
    if isinstance(ours, list | dict):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return False
        keys = ours if isinstance(ours, dict) else range(len(ours))
        return all(alike(ours[key], theirs[key]) for key in keys)
    return type(ours) is type(theirs) and ours == theirs


def refusal_names(source: Path, error: DataError) -> bool:
    return str(source) in str(error) and len(str(error)) < 2000


def is_plain_json(path: Path) -> bool:
    """Whether orjson, which is strict, takes every line as an object."""
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


def run(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy) -> None:
    quiet = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    quiet(given(*strategies)(check))()


@pytest.fixture
def seen() -> Iterator[Counter[str]]:
    """Counts of what became of the examples; a test that only refuses, or only accepts, is none."""
    counts: Counter[str] = Counter()
    yield counts
    print(dict(counts))  # shown with -s
    assert set(counts) == {"accepted", "refused"}


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files(kind, seen, tmp_path):
    run(check_damaged(kind, seen, tmp_path), 40, st.integers(0, 29), DAMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files_at_length(kind, seen, tmp_path):
    run(check_damaged(kind, seen, tmp_path), 2000, st.integers(0, 29), DAMAGE)


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
    tokenizer.unk_token = None  # of characters beyond its alphabet it makes <pad>
    tokenizer.chat_template = TEMPLATE

    def check(records: list[Any], chat: bool, ascii_only: bool) -> None:
        path = tmp_path / "data.jsonl"
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        assert data_digest(str(path)) == data_digest(str(path))
        for load, field in ((load_prompts, "answer"), (load_sft_samples, "response")):
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
    if prompt.verifier:  # of RL prompts; a supervised example has neither verifier nor answer
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
    run(check_values(seen, tmp_path), 150, RECORDS, st.booleans(), st.booleans())


@pytest.mark.slow
def test_odd_values_at_length(seen, tmp_path):
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
    """Random bytes as the column's values, with nulls: dates and texts that no reader may like among them."""
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
            return  # not a type that the writer knows, or a table without columns
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
    run(check_columns(seen, tmp_path), 80, st.data())


@pytest.mark.slow
def test_columns_of_any_type_at_length(seen, tmp_path):
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


def test_directories(seen, tmp_path):
    run(check_directories(seen, tmp_path), 60, NAMES)


@pytest.mark.slow
def test_directories_at_length(seen, tmp_path):
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


def test_arithmetic_specifications(seen):
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
