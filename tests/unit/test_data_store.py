"""Saved rollouts, and samples encoded for other ranks."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import StoreError, decode_samples, encode_samples, read_groups, write_groups
from megatron_rl.data.top_tokens import TopTokens, TopTokensError
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.rewards import grade

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # lone surrogates are not UTF-8
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
logprob = st.floats(-(2.0**100), 0, width=32)
verdicts = st.none() | st.builds(Verdict, st.floats(allow_nan=False, allow_infinity=False), st.booleans())


def some_trace(
    rows: int, *, layers: int = 2, top_k: int = 2, num_experts: int = 8, seed: int = 0, missing: float = 0.2
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(num_experts), (rows, layers, 1)), axis=-1)[..., :top_k]
    ids[rng.random(rows) < missing] = -1
    spans = (VersionSpan(seed, 0, rows),)
    return RoutingTrace.from_ids(ids, layers=range(layers), num_experts=num_experts, source="rollout", versions=spans)


def some_top_tokens(sample: Sample, k: int) -> TopTokens:
    """Likely tokens that agree with the sample; those that it did not generate have none."""
    n = len(sample.response_ids)
    ids = np.random.default_rng(n).permuted(np.tile(np.arange(9, dtype=np.int32), (n, 1)), axis=1)[:, :k]
    logprobs = np.full((n, k), -2.5, dtype=np.float32) - np.arange(k, dtype=np.float32)
    logprobs[:, k - 1] = -np.inf
    mu = sample.rollout_logprobs[len(sample.prompt.token_ids) :, None]
    own = ids == sample.response_ids[:, None]
    agreed = np.where(own, np.where(mu < -2.5, mu, -np.inf), logprobs)
    return TopTokens(ids, agreed.astype(np.float32))


@st.composite
def groups(draw) -> Group:
    prompt = Prompt(draw(text), draw(text), tuple(draw(token_ids)), draw(text), draw(text))
    samples = []
    for index in range(draw(st.integers(0, 3))):
        sample = Sample.start(prompt, index)
        for ids in draw(st.lists(token_ids, max_size=3)):
            logprobs = draw(st.none() | st.lists(logprob, min_size=len(ids), max_size=len(ids)))
            sample = sample.extend(ids, logprobs, draw(st.integers(0, 9)))
        if draw(st.booleans()):
            rows = draw(st.integers(0, len(sample.token_ids)))
            trace = some_trace(rows, num_experts=draw(st.sampled_from([8, 300])), seed=draw(st.integers(0, 9)))
            sample = sample.with_trace(trace)
        if draw(st.booleans()):
            sample = sample.with_top_tokens(some_top_tokens(sample, draw(st.integers(1, 4))))
        reason = draw(st.sampled_from([None, "stop", "length", "abort"]))
        known = {"finish_reason": reason, "verdict": draw(verdicts), "response": draw(st.none() | text)}
        samples.append(dataclasses.replace(sample, **known))
    return Group(draw(st.integers(0, 99)), prompt, tuple(samples))


def assert_same(one: Sample, other: Sample) -> None:
    for field in dataclasses.fields(Sample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes(), field.name  # bit for bit, including -0.0 and denormal numbers
        elif isinstance(a, RoutingTrace):
            assert isinstance(b, RoutingTrace)
            assert a.checksum == b.checksum
        elif isinstance(a, TopTokens):
            assert isinstance(b, TopTokens)
            assert (a.ids.tobytes(), a.logprobs.tobytes()) == (b.ids.tobytes(), b.logprobs.tobytes())
        else:
            assert a == b, field.name


@settings(deadline=None)  # a disk may be slow
@given(st.lists(groups(), max_size=3))
def test_groups_are_unchanged_after_saving_and_reading(tmp_path_factory, batch):
    path = tmp_path_factory.mktemp("rollouts") / "step.jsonl"
    write_groups(path, batch, weight_version=4)
    back = read_groups(path)
    assert [(g.index, g.prompt) for g in back] == [(g.index, g.prompt) for g in batch]
    for one, other in zip(batch, back, strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            assert_same(a, b)


@given(st.lists(groups(), max_size=3))
def test_encoded_samples_keep_everything_but_traces_and_text(batch):
    samples = [sample for group in batch for sample in group.samples]
    for one, other in zip(samples, decode_samples(encode_samples(samples)), strict=True):
        assert_same(dataclasses.replace(one, trace=None, top_tokens=None, response=None), other)


def test_a_trace_adds_nothing_to_the_bytes_sent_between_ranks():
    (sample,) = one_group().samples
    assert encode_samples([sample.with_trace(some_trace(5))]) == encode_samples([sample])


def one_group() -> Group:
    prompt = Prompt("q:1", "1+1=", (3, 4), "2", "arithmetic")
    sample = Sample.start(prompt, 0).extend([5, 6, 7], [-0.1, -1e-42, -3.5], 7)
    judged = dataclasses.replace(sample, finish_reason="stop", verdict=Verdict(1.0, True), response="text of it")
    return Group(0, prompt, (judged,))


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step.jsonl"
    write_groups(path, [one_group(), one_group()], weight_version=7)
    return path


def test_a_saved_file_has_readable_prompts_and_responses(tmp_path):
    header, first, _ = saved(tmp_path).read_bytes().splitlines()
    assert orjson.loads(header).items() >= {"format": 2, "weight_version": 7, "groups": 2}.items()
    assert orjson.loads(first)["prompt"]["text"] == "1+1="
    assert orjson.loads(first)["samples"][0]["response"] == "text of it"


def test_the_text_that_was_judged_is_saved(tmp_path):
    (graded,) = grade([one_group()], lambda ids: f"{len(ids)} tokens")
    write_groups(tmp_path / "step.jsonl", [graded], weight_version=7)
    line = orjson.loads((tmp_path / "step.jsonl").read_bytes().splitlines()[1])
    assert [sample["response"] for sample in line["samples"]] == ["3 tokens"]
    assert read_groups(tmp_path / "step.jsonl")[0].samples[0].response == "3 tokens"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = saved(tmp_path)
    before = path.read_bytes()

    (sample,) = one_group().samples
    unwritable = dataclasses.replace(one_group(), samples=(dataclasses.replace(sample, response="\ud800"),))
    with pytest.raises(TypeError, match="surrogates"):
        write_groups(path, [one_group(), unwritable], weight_version=8)
    assert path.read_bytes() == before


def written(trace: RoutingTrace) -> str:
    return "raw:" + base64.b64encode(trace.to_bytes()).decode()


def test_a_file_without_traces_is_read(tmp_path):
    assert b"trace" not in saved(tmp_path).read_bytes()
    assert read_groups(saved(tmp_path))[0].samples[0].trace is None


@pytest.mark.parametrize(("num_experts", "form"), [(16, "zlib"), (256, "raw")])
def test_a_trace_is_compressed_only_if_that_saves_space(tmp_path, num_experts, form):
    trace = some_trace(200, layers=8, top_k=4, num_experts=num_experts, missing=0.0)
    sample = Sample.start(Prompt("p", "", tuple(range(200)), "", ""), 0).with_trace(trace)
    path = tmp_path / "step.jsonl"
    write_groups(path, [Group(0, sample.prompt, (sample,))], weight_version=0)
    text = orjson.loads(path.read_bytes().splitlines()[1])["samples"][0]["trace"]
    assert text.startswith(form + ":")
    data = base64.b64decode(text.partition(":")[2])
    assert (zlib.decompress(data) if form == "zlib" else data) == trace.to_bytes()
    assert form == "raw" or len(data) < 0.8 * trace.experts.nbytes
    assert_same(read_groups(path)[0].samples[0], sample)


def edit(path: Path, line: int, change) -> None:
    """Changes a line of the file, and updates the checksums."""
    records = [orjson.loads(each) for each in path.read_bytes().splitlines()]
    change(records[line - 1])
    path.write_bytes(sealed(records))


def sealed(records: list[dict[str, Any]]) -> bytes:
    """Returns the lines of a rollout file, written from the format's description."""
    lines, checksum = [], ""
    for record in records:
        body = orjson.dumps({key: value for key, value in record.items() if key != "checksum"})[:-1]
        checksum = hashlib.blake2b(checksum.encode() + body, digest_size=16).hexdigest()
        lines.append(body + f',"checksum":"{checksum}"}}\n'.encode())
    return b"".join(lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["samples"][0]["token_ids"].pop(), "4 token_ids, 5 loss_mask and 5 rollout_logprobs"),
        (lambda r: r["samples"][0].pop("versions"), r"samples\.0\.versions: Field required"),
        (lambda r: r["samples"][0].update(lossmask=[]), r"samples\.0\.lossmask: Extra"),
        (lambda r: r["samples"][0]["token_ids"].__setitem__(3, 5.5), r"samples\.0\.token_ids\.3"),
        (lambda r: r["samples"][0]["token_ids"].__setitem__(3, "5"), r"samples\.0\.token_ids\.3"),
        (lambda r: r["samples"][0]["token_ids"].__setitem__(3, 2**31), r"samples\.0\.token_ids\.3"),
        (lambda r: r["samples"][0]["rollout_logprobs"].__setitem__(3, 0.5), "less than or equal to 0"),
        (lambda r: r["samples"][0]["rollout_logprobs"].__setitem__(3, None), r"rollout_logprobs\.3"),
        (lambda r: r["samples"][0]["loss_mask"].__setitem__(0, 1), "does not begin with its prompt"),
        (lambda r: r["samples"][0]["token_ids"].__setitem__(0, 9), "does not begin with its prompt"),
        (lambda r: r["samples"][0].update(versions=[[7, 2, 6]]), "versions: the spans do not follow"),
        (lambda r: r["samples"][0].update(versions=[[7, 2, 4]]), "versions: the spans do not follow"),
        (lambda r: r["samples"][0].update(versions=[[7, 1, 5]]), "versions: the spans do not follow"),
        (lambda r: r["samples"][0].update(versions=[[7, 2, 5], [8, 5, 3]]), "versions: the spans do not follow"),
        (lambda r: r["samples"][0].update(versions=[[7, 2, 9], [8, 9, 5]]), "versions: the spans do not follow"),
        (lambda r: r["samples"][0].update(versions=[[2**63, 2, 5]]), r"versions\.0\.0"),
        (lambda r: r["samples"][0]["rollout_logprobs"].__setitem__(3, -1e39), r"rollout_logprobs\.3"),
        (lambda r: r["samples"][0].update(sample=1), r"samples: found numbers \[1\]; expected 0 to 0"),
        (lambda r: r["samples"].append(r["samples"][0]), r"samples: found numbers \[0, 0\]; expected 0 to 1"),
        (lambda r: r["samples"][0].update(finish_reason="stopped"), "finish_reason"),
        (lambda r: r["samples"][0].update(verdict=[None, True]), r"verdict\..*0"),
        (lambda r: r["prompt"].pop("answer"), r"prompt\.answer"),
        (lambda r: r["samples"][0].update(trace=5), r"samples\.0\.trace"),
        (lambda r: r["samples"][0].update(trace="AAAA"), r"samples\.0\.trace: .*expected raw:\.\.\. or zlib:"),
        (lambda r: r["samples"][0].update(trace="raw:?"), r"samples\.0\.trace: .*no raw data"),
        (lambda r: r["samples"][0].update(trace="raw:ä"), r"samples\.0\.trace: .*no raw data"),
        (lambda r: r["samples"][0].update(trace="zlib:AAAA"), r"samples\.0\.trace: .*no zlib data"),
        (lambda r: r["samples"][0].update(trace="raw:AAAA"), r"samples\.0\.trace: .*no routing trace"),
        (lambda r: r["samples"][0].update(trace=written(some_trace(6))), "trace: 6 rows for 5 tokens"),
    ],
)
def test_the_error_for_a_damaged_record_names_file_line_and_field(tmp_path, change, message):
    path = saved(tmp_path)
    edit(path, 3, change)
    with pytest.raises(StoreError, match=rf"step\.jsonl:3: not a group: .*{message}"):
        read_groups(path)


def test_a_compressed_trace_that_grows_too_large_is_refused_in_time(tmp_path):
    path = saved(tmp_path)
    bomb = "zlib:" + base64.b64encode(zlib.compress(bytes(64 << 20))).decode()
    edit(path, 3, lambda record: record["samples"][0].update(trace=bomb))
    tracemalloc.start()
    with pytest.raises(StoreError, match=r"samples\.0\.trace: .*grows beyond \d+ bytes, too many for 5 tokens"):
        read_groups(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_file_that_is_truncated_or_not_a_rollout_is_refused(tmp_path):
    path = saved(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in [
        (b"", ":1: the line does not end in its checksum"),
        (sealed([orjson.loads(lines[1])]), ":1: not the header"),
        (sealed([{"format": 3, "weight_version": 7, "groups": 0}]), ":1: not the header of a rollout file: format"),
        (b'{"format":1,"weight_version":0,"groups":0}\n', ":1: .* found format 1, whose lines have no checksums"),
        (b"".join(lines[:2]), "the header says 2 groups, 1 are there"),
        (b"".join(lines)[:-10], ":3: the line does not end in its checksum; it is cut off"),
        (b"".join(lines)[:-1], ":3: the line does not end in its checksum; it is cut off"),
        (b"".join([lines[0], lines[2], lines[1]]), ":2: the checksum .* does not match"),
        (b"".join([lines[0], lines[2]]), ":2: the checksum .* does not match"),
        (b"".join([*lines, lines[2]]), ":4: the checksum .* does not match"),
        (b"".join(lines).replace(b"text of it", b"text of us", 1), ":2: the checksum .* does not match"),
        (b"".join(lines).replace(b"-3.5", b"-3.4", 1), ":2: the checksum .* does not match"),
        (
            b"".join(lines).replace(b'"weight_version":7', b'"weight_version":8', 1),
            ":1: the checksum .* does not match",
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            read_groups(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_groups(path)


def test_likely_tokens_of_another_response_are_refused(tmp_path):
    sample = one_group().samples[0]
    top = TopTokens(np.array([[5], [6], [7]], dtype=np.int32), np.array([[-0.1], [-0.0], [-3.5]], dtype=np.float32))
    for changed, message in (
        (
            TopTokens(top.ids, top.logprobs - 1),
            "top_tokens: token 0: .*expected the sampled token's log-prob",
        ),
        (TopTokens(top.ids[:2], top.logprobs[:2]), "top_tokens: found 2 rows; expected 3"),
    ):
        spoilt = dataclasses.replace(one_group(), samples=(dataclasses.replace(sample, top_tokens=changed),))
        write_groups(tmp_path / "step.jsonl", [spoilt], weight_version=7)
        with pytest.raises(StoreError, match=rf"step\.jsonl:2: not a group: .*sample 0: {message}"):
            read_groups(tmp_path / "step.jsonl")
    with pytest.raises(ValueError, match="top tokens of 2 tokens for a response of 3"):
        sample.with_top_tokens(TopTokens(top.ids[:2], top.logprobs[:2]))
    assert_same(sample.with_top_tokens(top), dataclasses.replace(sample, top_tokens=top))


def test_a_row_may_miss_several_likely_tokens():
    logprobs = np.array([[-0.1, -np.inf, -np.inf]], dtype=np.float32)
    assert TopTokens(np.array([[5, 0, 0]], dtype=np.int32), logprobs).k == 3
    with pytest.raises(TopTokensError, match=r"token 0: .*expected different ids"):
        TopTokens(np.array([[5, 7, 7]], dtype=np.int32), np.full((1, 3), -2, dtype=np.float32))


def test_bytes_that_are_no_likely_tokens_are_refused(tmp_path):
    sample = one_group().samples[0]
    good = dataclasses.replace(one_group(), samples=(sample.with_top_tokens(some_top_tokens(sample, 2)),))
    write_groups(tmp_path / "step.jsonl", [good], weight_version=7)
    assert read_groups(tmp_path / "step.jsonl")[0].samples[0].top_tokens is not None
    with pytest.raises(TopTokensError, match="found 3 bytes that are no top tokens"):
        TopTokens.from_bytes(b"abc")
    with pytest.raises(TopTokensError, match=r"found ids int64 \[1, 1\]"):
        TopTokens(np.zeros((1, 1), dtype=np.int64), np.zeros((1, 1), dtype=np.float32))
    with pytest.raises(TopTokensError, match="expected ids of at least 0"):
        TopTokens(np.full((1, 1), -1, dtype=np.int32), np.full((1, 1), -1, dtype=np.float32))
