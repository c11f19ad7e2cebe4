"""Damaged rollout files and routing traces: refused with the project's own errors, or read as they were written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
from fuzzing import FEW, MANY
from hypothesis import event, given
from hypothesis import strategies as st

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import StoreError, read_groups, write_groups
from megatron_rl.data.trace import RoutingTrace, TraceError
from megatron_rl.data.versions import VersionSpan

VALUES = [
    *(None, True, False, "", "x", "é", [], {}, [0], [[0, 0, 0]], {"a": 1}, "raw:", "zlib:AAAA", "0" * 40),
    *(-1, 0, 1, 2, 5, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**64, -(2**63), 10**25),
    *(0.5, -0.0, -1e-45, -3.4e38, -1e39, -1e308, 1e39, float("inf"), float("nan")),
]


def make_trace(rows: int, num_experts: int) -> RoutingTrace:
    rng = np.random.default_rng(rows)
    ids = rng.permuted(np.tile(np.arange(num_experts), (rows, 2, 1)), axis=-1)[..., :2]
    ids[1] = -1
    spans = (VersionSpan(0, 0, 2), VersionSpan(1, 2, rows))
    return RoutingTrace.from_ids(ids, layers=(0, 3), num_experts=num_experts, source="rollout", versions=spans)


def make_groups() -> list[Group]:
    groups = []
    for index, experts in enumerate((8, 300, None)):
        prompt = Prompt(f"p{index}", "1+1=", (3, 4), "2", "arithmetic")
        samples = []
        for number in range(2):
            sample = Sample.start(prompt, number).extend([5, 6], [-0.25, -1e-42], 0).extend([7], None, 0)
            sample = sample.extend([8 + number], [-3.4e38], 1)
            if experts:
                sample = sample.with_trace(make_trace(5, experts))
            judged: dict[str, Any] = {"verdict": Verdict(0.5, True), "finish_reason": "stop", "response": "2 é"}
            samples.append(dataclasses.replace(sample, **judged))
        groups.append(Group(index, prompt, tuple(samples)))
    return groups


def dump(value: Any) -> bytes:
    """Writes JSON with NaN, infinities and integers of any length, which orjson cannot write."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sealed(records: list[Any]) -> bytes:
    """Returns lines with correct checksums, written from the format's description."""
    lines, checksum = [], ""
    for record in records:
        body = dump({key: value for key, value in record.items() if key != "checksum"})[:-1]
        checksum = hashlib.blake2b(checksum.encode() + body, digest_size=16).hexdigest()
        lines.append(body + f',"checksum":"{checksum}"}}\n'.encode())
    return b"".join(lines)


# ---- kinds of damage ---------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.choice(["flip", "set", "insert", "delete", "cut", "repeat"])
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "set" and at < len(changed):
            changed[at] = rng.choice(b'0123456789-+.eE,:"{}[]\n \0\xff')
        elif kind == "insert":
            changed[at:at] = rng.choice([b"0", b"\n", b",", b"}", b"\xff", b"\0", b'"', b"\r"])
        elif kind == "delete":
            del changed[at : at + rng.choice([1, 1, 40])]
        elif kind == "cut":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 40]
    return bytes(changed)


def moved_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(["swap", "drop", "double", "shuffle", "join", "blank"])
    if kind == "swap":
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == "drop":
        del lines[one]
    elif kind == "double":
        lines.insert(other, lines[one])
    elif kind == "shuffle":
        rng.shuffle(lines)
    elif kind == "join":
        lines[one] = lines[one].rstrip(b"\n")
    else:
        lines.insert(one, b"\n")
    return b"".join(lines)


def changed_value(tree: Any, rng: random.Random) -> None:
    """Changes one value somewhere in the tree, in place."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.9:
            tree = tree[key]
            continue
        kind = rng.choice(["value", "value", "value", "delete", "nudge"])
        if kind == "delete":
            del tree[key]
        elif kind == "nudge" and isinstance(tree[key], int | float):
            tree[key] += rng.choice([-1, 1, -0.5])
        else:
            tree[key] = rng.choice(VALUES)
        return


def changed_records(data: bytes, rng: random.Random) -> list[Any]:
    records = [orjson.loads(line) for line in data.splitlines()]
    for _ in range(rng.choice([1, 1, 2])):
        changed_value(rng.choice(records), rng)
    return records


# ---- comparison with the written content -------------------------------------------------------------------------


def plain(group: Group) -> dict[str, Any]:
    samples = [
        {
            "sample": s.index,
            "versions": [[v.version, v.start, v.end] for v in s.versions],
            "finish_reason": s.finish_reason,
            "verdict": None if s.verdict is None else [s.verdict.reward, s.verdict.correct],
            "response": s.response,
            "token_ids": s.token_ids.tolist(),
            "loss_mask": s.loss_mask.astype(int).tolist(),
            "rollout_logprobs": s.rollout_logprobs.tolist(),
            "trace": s.trace.checksum if s.trace else None,
        }
        for s in group.samples
    ]
    return {
        "index": group.index,
        "prompt": {**vars(group.prompt), "token_ids": [*group.prompt.token_ids]},
        "samples": samples,
    }


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a line, read without the store's code, except for traces."""
    import base64
    import zlib

    for sample in record["samples"]:
        sample["rollout_logprobs"] = np.asarray(sample["rollout_logprobs"], np.float64).astype(np.float32).tolist()
        sample.setdefault("response", None)
        written = sample.get("trace")
        if written is not None:
            form, _, text = written.partition(":")
            data = base64.b64decode(text)
            sample["trace"] = RoutingTrace.from_bytes(zlib.decompress(data) if form == "zlib" else data).checksum
        else:
            sample["trace"] = None
    record["prompt"] = {**record["prompt"], "record": None}  # saved rollouts hold no records
    return {key: record[key] for key in ("index", "prompt", "samples")}


@functools.cache
def whole_file(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Returns (bytes, content) of an undamaged file."""
    write_groups(path, make_groups(), weight_version=0, temperature=1.0, vocab_size=45)
    return path.read_bytes(), [plain(group) for group in make_groups()]


def check_file(path: Path, damage: str, seed: int) -> str:
    """Damages and reads a file; returns 'refused' or 'accepted'."""
    rng = random.Random(seed)
    whole, written = whole_file(path.with_name("whole.jsonl"))
    if damage == "values":
        records = changed_records(whole, rng)
        path.write_bytes(b"".join(dump(record) + b"\n" for record in records))
    elif damage == "values with their checksums":
        records = changed_records(whole, rng)
        path.write_bytes(sealed(records))
    else:
        damaging: Callable[[bytes, random.Random], bytes] = damaged_bytes if damage == "bytes" else moved_lines
        path.write_bytes(damaging(whole, rng))
    try:
        found = read_groups(path)
    except StoreError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: \S", refusal)
        assert "\n" not in refusal
        return "refused"
    if damage == "values with their checksums":
        written = [as_read(orjson.loads(line)) for line in path.read_bytes().splitlines()[1:]]
    assert [plain(group) for group in found] == written
    assert all(np.isfinite(s.rollout_logprobs).all() for group in found for s in group.samples)
    return "accepted"


def resealed_trace(data: bytes, rng: random.Random) -> bytes:
    """Changes a value in a trace's header, and updates the checksum."""
    arrays = safetensors.numpy.load(data)
    header = orjson.loads(arrays["header"].tobytes())
    changed_value(header, rng)
    for name in ("experts", "present"):
        if rng.random() < 0.3:
            flat = arrays[name].reshape(-1).copy()
            flat[rng.randrange(len(flat))] = rng.choice([0, 1, 7, 8, 255])
            arrays[name] = flat.reshape(arrays[name].shape)
    said = {key: value for key, value in header.items() if key not in ("format", "checksum")}
    digest = hashlib.blake2b(dump(said), digest_size=16)
    digest.update(arrays["experts"].tobytes())
    digest.update(arrays["present"].tobytes())
    text = dump({**header, "checksum": digest.hexdigest()})
    return safetensors.numpy.save({**arrays, "header": np.frombuffer(text, dtype=np.uint8)})


def check_trace(damage: str, seed: int) -> str:
    rng = random.Random(seed)
    trace = make_trace(rng.choice([4, 9]), rng.choice([8, 300]))
    data = trace.to_bytes()
    data = damaged_bytes(data, rng) if damage == "bytes" else resealed_trace(data, rng)
    try:
        found = RoutingTrace.from_bytes(data)
    except TraceError:
        return "refused"
    if damage == "bytes":
        assert found.checksum == trace.checksum
    assert found.experts[found.present].max(initial=0) < found.num_experts
    assert RoutingTrace.from_bytes(found.to_bytes()).checksum == found.checksum
    return "accepted"


# ---- the tests ---------------------------------------------------------------------------------------------------

FILES = st.tuples(
    st.sampled_from(["bytes", "lines", "values", "values with their checksums"]), st.integers(0, 2**64 - 1)
)
TRACES = st.tuples(st.sampled_from(["bytes", "values with their checksums"]), st.integers(0, 2**64 - 1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "step-000001-dp-0000.jsonl"


@FEW
@given(FILES)
def test_a_damaged_file_is_refused_or_harmless(path: Path, case: tuple[str, int]) -> None:
    check_file(path, *case)


@FEW
@given(TRACES)
def test_a_damaged_trace_is_refused_or_harmless(case: tuple[str, int]) -> None:
    check_trace(*case)


@pytest.mark.slow
@MANY
@given(FILES)
def test_many_damaged_files_are_refused_or_harmless(path: Path, case: tuple[str, int]) -> None:
    event(f"{case[0]}: {check_file(path, *case)}")


@pytest.mark.slow
@MANY
@given(TRACES)
def test_many_damaged_traces_are_refused_or_harmless(case: tuple[str, int]) -> None:
    event(f"{case[0]}: {check_trace(*case)}")


@pytest.mark.parametrize("damage", ["bytes", "lines", "values"])
def test_a_file_that_differs_by_one_byte_is_refused(path: Path, damage: str) -> None:
    """Damages 200 files without updating checksums. A file that is equal by chance is accepted."""
    for seed in range(200):
        outcome = check_file(path, damage, seed)
        same = path.read_bytes() == whole_file(path.with_name("whole.jsonl"))[0]
        assert outcome == ("accepted" if same else "refused")


def test_a_whole_file_is_accepted(path: Path) -> None:
    """Otherwise the fuzzer would pass with a reader that refuses everything."""
    write_groups(path, make_groups(), weight_version=0)
    assert [plain(group) for group in read_groups(path)] == [plain(group) for group in make_groups()]
