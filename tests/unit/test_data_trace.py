"""The routing trace: refused inputs, encoding and decoding, checksums and appending."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.trace import RoutingTrace, TraceError
from megatron_rl.data.versions import VersionSpan

LAYERS = (1, 3, 4)


def some_ids(rows: int = 5, layers: int = 3, top_k: int = 2, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(num_experts), (rows, layers, 1)), axis=-1)[..., :top_k]


def make(ids: np.ndarray | None = None, **changes: Any) -> RoutingTrace:
    ids = some_ids() if ids is None else ids
    spans = (VersionSpan(7, 0, len(ids)),)
    arguments = {"layers": LAYERS, "num_experts": 8, "source": "rollout", "versions": spans, **changes}
    return RoutingTrace.from_ids(ids, **arguments)


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    for field in dataclasses.fields(RoutingTrace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), field.name
        else:
            assert a == b, field.name


@st.composite
def traces(draw: st.DrawFn) -> tuple[np.ndarray, RoutingTrace]:
    num_experts = draw(st.sampled_from([4, 256, 257, 1000]))
    layers = draw(st.lists(st.integers(0, 60), max_size=4, unique=True).map(sorted))
    rows, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    ids = some_ids(rows, len(layers), top_k, num_experts, seed=draw(st.integers(0, 99)))
    ids[draw(st.lists(st.booleans(), min_size=rows, max_size=rows).map(np.flatnonzero))] = -1
    cuts = [0, *sorted(draw(st.lists(st.integers(0, rows), max_size=3))), rows]
    spans = tuple(VersionSpan(draw(st.integers(0, 9)), a, b) for a, b in itertools.pairwise(cuts))
    source = draw(st.sampled_from(["rollout", "trainer"]))
    return ids, make(ids, layers=layers, num_experts=num_experts, source=source, versions=spans)


@given(traces())
def test_ids_are_kept_and_missing_rows_are_absent(made: tuple[np.ndarray, RoutingTrace]) -> None:
    ids, trace = made
    assert trace.experts.dtype == (np.uint8 if trace.num_experts <= 256 else np.uint16)
    assert (trace.rows, len(trace.layers), trace.top_k) == ids.shape
    if len(trace.layers):
        assert np.array_equal(trace.present, (ids >= 0).any(axis=(1, 2)))
    assert np.array_equal(trace.experts[trace.present], ids[trace.present])
    assert not trace.experts[~trace.present].any()


@given(traces())
def test_a_trace_is_unchanged_after_encoding_and_decoding(made: tuple[np.ndarray, RoutingTrace]) -> None:
    back = RoutingTrace.from_bytes(made[1].to_bytes())
    assert_same(back, made[1])
    assert back.checksum == made[1].checksum


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.uint16), (1 << 16, np.uint16)])
def test_the_highest_expert_id_fits_the_dtype(num_experts: int, dtype: type) -> None:
    ids = some_ids(num_experts=8)
    ids[2, 1] = num_experts - 1, num_experts - 2
    trace = make(ids, num_experts=num_experts)
    assert trace.experts.dtype == dtype
    assert trace.experts[2, 1].tolist() == [num_experts - 1, num_experts - 2]


def changed(row: int, column: int, *experts: int) -> np.ndarray:
    ids = some_ids()
    ids[row, column] = experts
    return ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (changed(2, 1, 8, 0), r"row 2, layer 3: found experts \[8, 0\]; expected ids in \[0, 8\)"),
        (changed(4, 2, 0, -2), r"row 4, layer 4: found experts \[0, -2\]; expected ids in \[0, 8\)"),
        (changed(4, 2, 0, 1 << 40), r"row 4, layer 4: .*; expected ids in \[0, 8\)"),
        (changed(0, 0, 5, 5), r"row 0, layer 1: found experts \[5, 5\]; expected 2 different experts"),
        (changed(3, 2, 0, 0), r"row 3, layer 4: found experts \[0, 0\]; expected 2 different experts"),
        (
            changed(1, 0, -1, 3),
            r"row 1, layer 1: found experts \[-1, 3\]; expected -1 in all layers of a row or in none",
        ),
        (changed(1, 2, -1, -1), r"row 1, layer 4: found experts \[-1, -1\]; expected -1 in all layers"),
        (some_ids().astype(float), r"ids: found float64 \[5, 3, 2\]; expected integers"),
        (some_ids()[:, 0], r"ids: found int64 \[5, 2\]; expected integers \[rows, layers, top_k\]"),
        (some_ids(layers=2), r"ids: found 2 layers; expected 3: \[1, 3, 4\]"),
    ],
)
def test_the_error_for_invalid_expert_ids_names_row_and_layer(ids: np.ndarray, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        make(ids)
    assert issubclass(TraceError, ValueError)


def test_a_repeated_expert_is_found_at_any_position() -> None:
    for a, b in [(0, 1), (0, 7), (3, 5), (6, 7)]:
        ids = some_ids(top_k=8, num_experts=9)
        ids[1, 1, a] = ids[1, 1, b]
        with pytest.raises(TraceError, match=r"row 1, layer 3: .* expected 8 different experts"):
            make(ids, num_experts=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 4, 3)}, r"layers: found \[1, 4, 3\]"),
        ({"layers": (1, 1, 3)}, r"layers: found \[1, 1, 3\]"),
        ({"layers": (-1, 1, 3)}, r"layers: found \[-1, 1, 3\]"),
        ({"num_experts": 0}, "expected"),
        ({"num_experts": (1 << 16) + 1}, "num_experts: found 65537; expected 1 to 65536"),
        ({"versions": ()}, r"versions: found spans \[\]; expected .* over 5 rows"),
        ({"versions": (VersionSpan(0, 0, 4),)}, r"versions: found spans \[\(0, 4\)\]"),
        ({"versions": (VersionSpan(0, 0, 6),)}, r"versions: found spans \[\(0, 6\)\]"),
        ({"versions": (VersionSpan(0, 1, 5),)}, r"versions: found spans \[\(1, 5\)\]"),
        ({"versions": (VersionSpan(0, 0, 2), VersionSpan(1, 3, 5))}, "versions: found spans"),
        ({"versions": (VersionSpan(0, 0, 3), VersionSpan(1, 2, 5))}, "versions: found spans"),
        ({"versions": (VersionSpan(0, 0, 6), VersionSpan(1, 6, 5))}, "versions: found spans"),
    ],
)
def test_metadata_that_does_not_fit_the_ids_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": some_ids()}, "experts: found int64"),
        ({"experts": some_ids().astype(np.uint16)}, "experts: found uint16"),
        ({"experts": some_ids().astype(np.uint8)[0]}, r"experts: found uint8 \[3, 2\]"),
        ({"experts": some_ids(layers=2).astype(np.uint8)}, r"experts: found uint8 \[5, 2, 2\]"),
        ({"present": np.ones(4, dtype=bool)}, r"present: found bool \[4\]; expected bool \[5\]"),
        ({"present": np.ones(5, dtype=np.uint8)}, "present: found uint8"),
    ],
)
def test_arrays_with_a_wrong_shape_or_dtype_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(make(), **changes)


def test_a_long_sequence_is_checked_in_bulk() -> None:
    """20,000 tokens, 48 layers, top-8 of 128 experts: 0.1 s. A check row by row would take minutes."""
    ids = np.tile(some_ids(200, 48, 8, 128).astype(np.int32), (100, 1, 1))
    ids[500:600] = -1
    start = time.process_time()
    trace = make(ids, layers=range(48), num_experts=128)
    assert time.process_time() - start < 2.0
    assert trace.experts.nbytes + trace.present.nbytes == 20_000 * (48 * 8 + 1)
    assert int((~trace.present).sum()) == 100


# ---- checksum


def test_the_checksum_is_the_same_on_every_machine() -> None:
    ids = np.arange(12).reshape(2, 3, 2) % 8
    ids[1] = -1
    assert make(ids).checksum == "236f5b7d759354230f64bc8eebc3f31c"
    assert make(ids, num_experts=300).checksum == "442e236b0b94535f991d8dd68000bdfd"


def test_the_checksum_does_not_depend_on_memory_layout() -> None:
    trace = make()
    strided = np.asfortranarray(trace.experts)
    assert dataclasses.replace(trace, experts=strided).checksum == trace.checksum


def test_the_checksum_depends_on_every_field_of_a_trace() -> None:
    trace = make()
    other_row, shorter = trace.experts.copy(), trace.present.copy()
    other_row[3, 1] = other_row[3, 1, ::-1]
    shorter[4] = False
    others = [
        dataclasses.replace(trace, layers=(1, 3, 5)),
        dataclasses.replace(trace, num_experts=9),
        dataclasses.replace(trace, source="trainer"),
        dataclasses.replace(trace, versions=(VersionSpan(8, 0, 5),)),
        dataclasses.replace(trace, experts=other_row),
        dataclasses.replace(trace, present=shorter),
    ]
    assert len({trace.checksum, *(other.checksum for other in others)}) == 1 + len(others)


def test_damaged_bytes_are_refused_or_read_unchanged() -> None:
    """A few bits of the container do not affect the trace, so their damage is harmless."""
    trace = make()
    data = trace.to_bytes()
    refused = 0
    for position in range(len(data)):
        for bit in (1, 4, 128):
            damaged = bytearray(data)
            damaged[position] ^= bit
            try:
                assert_same(RoutingTrace.from_bytes(bytes(damaged)), trace)
            except TraceError:
                refused += 1
    assert refused > 0.95 * 3 * len(data)


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, pickle.dumps({"experts": 1}), make().to_bytes()[:-1]])
def test_bytes_that_are_not_a_trace_are_refused(data: bytes) -> None:
    with pytest.raises(TraceError, match="no routing trace"):
        RoutingTrace.from_bytes(data)


def test_damaged_ids_are_refused_by_the_checksum() -> None:
    data = make().to_bytes()
    at = data.index(make().experts.tobytes())
    with pytest.raises(TraceError, match=r"damaged: found checksum \w{32}; expected \w{32}"):
        RoutingTrace.from_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_a_trace_of_a_later_format_is_refused() -> None:
    data = make().to_bytes().replace(b'{"format":1', b'{"format":2')
    with pytest.raises(TraceError, match="found a trace of format 2; expected 1"):
        RoutingTrace.from_bytes(data)


# ---- appending


def test_appending_a_trace_adds_its_rows_and_versions() -> None:
    first, second = make(), make(some_ids(3, seed=1), versions=(VersionSpan(7, 0, 1), VersionSpan(8, 1, 3)))
    both = first.append(second)
    assert np.array_equal(both.experts, np.concatenate([first.experts, second.experts]))
    assert both.versions == (VersionSpan(7, 0, 6), VersionSpan(8, 6, 8))
    assert both.present.all()


def test_missing_rows_can_be_appended() -> None:
    trace = make().append_missing(2, 8).append_missing(1, 8).append(make(some_ids(2)))
    assert trace.present.tolist() == [True] * 5 + [False] * 3 + [True] * 2
    assert not trace.experts[5:8].any()
    assert trace.versions == (VersionSpan(7, 0, 5), VersionSpan(8, 5, 8), VersionSpan(7, 8, 10))
    assert trace.experts.dtype == np.uint8
    assert_same(RoutingTrace.from_bytes(trace.to_bytes()), trace)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(layers=(1, 3, 5)), r"layers: found \(1, 3, 5\) in the rows to append; expected \(1, 3, 4\)"),
        (make(num_experts=9), "num_experts: found 9 in the rows to append; expected 8"),
        (make(source="trainer"), "source: found 'trainer'"),
        (make(some_ids(top_k=3)), "top_k: found 3"),
    ],
)
def test_appending_rows_of_other_routers_is_refused(other: RoutingTrace, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        make().append(other)


# ---- in a sample


def test_a_trace_longer_than_its_sample_is_refused() -> None:
    sample = Sample.start(Prompt("q:1", "", (3, 4), "", ""), 2).extend([5, 6, 7], [-0.1, -0.2, -0.3], 7)
    trace = make(some_ids(4))
    assert sample.with_trace(trace).trace is trace
    assert sample.with_trace(make(some_ids(5))).token_ids is sample.token_ids
    assert sample.trace is None
    with pytest.raises(ValueError, match="prompt 'q:1' sample 2: a routing trace of 6 rows for 5 tokens"):
        sample.with_trace(make(some_ids(6)))
