"""Answers that are spoilt at random: an error of the project's own, or what an independent reading finds in them.

`read_strictly` is that reading, written from the conventions in megatron_rl/rollout/answers.py, not from its code.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.sample import Prompt
from megatron_rl.rollout import client as client_module
from megatron_rl.rollout.answers import Completion, RolloutError, read_completion
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.sampler import as_sample
from megatron_rl.routing.wire import RouteSpec

FEW = settings(max_examples=200, derandomize=True, deadline=None, database=None)
MANY = settings(max_examples=10_000, deadline=None, database=None)

PROMPT, LONGEST, VOCAB, VERSIONS = (4, 5, 6), 6, 9, {6, 7}
SPEC = RouteSpec(num_layers=2, moe_layers=(1,), top_k=2, num_experts=4)


def routes(rows: int) -> str:
    return base64.b64encode(np.tile(np.array([[0, 0], [3, 1]], "<i4"), (rows, 1, 1)).tobytes()).decode()


def answer(tokens: int, reason: str) -> dict[str, Any]:
    """As SGLang gives it."""
    ids = [2 + n for n in range(tokens)]
    finish: dict[str, Any] = {"type": reason}
    if reason == "stop":
        finish["matched"] = ids[-1]
    return {
        "text": "abc",
        "output_ids": ids,
        "meta_info": {
            "id": "r",
            "finish_reason": finish,
            "prompt_tokens": len(PROMPT),
            "completion_tokens": tokens,
            "cached_tokens": 0,
            "weight_version": "7",
            "weight_versions": [{"version": "6", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": tokens}],
            "num_retractions": 0,
            "output_token_logprobs": [[-0.5 - n, token, None] for n, token in enumerate(ids)],
            "routed_experts": routes(len(PROMPT) + tokens - 1),
        },
    }


GOOD = [answer(LONGEST, "length"), answer(4, "stop"), answer(3, "abort")]

# ---- spoiling

NUMBERS = [0, -1, 1, 2, 5, 6, 7, 8, 9, 1e-7, 0.01, 1.5, -1e-40, -3.4e38, -3.5e38, -1e308, 2**31, 2**63, 10**30]
TEXTS = ["", "6", "06", " 6", "+6", "٦", "8", "9" * 5000, "stop", "length", "abort", "NaN", "A" * 8, "é", "\x00"]
LEAVES = st.one_of(
    st.sampled_from([None, True, False, math.nan, math.inf, -math.inf, *NUMBERS, *TEXTS]),
    st.integers(-3, 12),
    st.floats(-20, 1),
    st.text(max_size=4),
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    given = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(list(places({"": given}))))
        if container.keys() == {""} if isinstance(container, dict) else False:
            return draw(VALUES)
        kind = draw(st.sampled_from(["replace", "replace", "delete", "double", "nudge", "move"]))
        value = container[key]
        if kind == "delete":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        elif kind == "nudge" and isinstance(value, int | float):
            container[key] = value + draw(st.sampled_from([-1, 1, 0.5]))
        elif kind == "move" and isinstance(container, list):
            container.append(container.pop(key))
        elif kind == "move" and isinstance(value, str):
            container[key] = value[: draw(st.integers(0, len(value)))] + draw(st.sampled_from(["", "A", "=", "-"]))
        else:
            container[key] = draw(VALUES)
    return given


# ---- the independent reading


def is_int(value: Any) -> bool:
    return type(value) is int


def read_strictly(found: Any) -> tuple[Any, ...] | None:
    """(ids, log-probs in fp32, reason, (version, start, end)s, routes) or None for an answer that must be refused."""
    try:
        meta, ids = found["meta_info"], found["output_ids"]
        finish, entries, spans = meta["finish_reason"], meta["output_token_logprobs"], meta["weight_versions"]
        reason = finish["type"]
    except (KeyError, TypeError, IndexError):
        return None
    containers = isinstance(ids, list) and isinstance(entries, list) and isinstance(spans, list)
    retractions, routed = meta.get("num_retractions", 0), meta.get("routed_experts")
    counts = (meta.get("prompt_tokens"), meta.get("completion_tokens"), retractions)
    if not containers or type(found.get("text")) is not str or not all(map(is_int, counts)):
        return None
    if not isinstance(finish, dict) or reason not in ("stop", "length", "abort") or type(reason) is not str:
        return None
    if not all(is_int(i) and 0 <= i < VOCAB for i in ids) or len(entries) != len(ids) or len(ids) > LONGEST:
        return None
    for entry, token in zip(entries, ids, strict=True):
        if not isinstance(entry, list) or len(entry) != 3 or not is_int(entry[1]) or entry[1] != token:
            return None
        logprob = entry[0]
        if type(logprob) not in (int, float) or not -3.4028234663852886e38 <= logprob <= 1e-6:
            return None
    if reason != "abort" and (not ids or counts[:2] != (len(PROMPT), len(ids))):
        return None
    if reason == "length" and len(ids) != LONGEST:
        return None
    if reason == "stop" and (not is_int(finish.get("matched")) or finish["matched"] != ids[-1]):
        return None
    covered, kept = 0, []
    for span in spans:
        if not isinstance(span, dict):
            return None
        version, start, end = span.get("version"), span.get("start"), span.get("end")
        if type(version) is not str or not is_int(start) or not is_int(end) or version not in ("6", "7"):
            return None
        if start != covered or end < start:
            return None
        covered = end
        if end > start:
            kept.append((int(version), start, end))
    if covered != len(ids):
        return None
    read = experts_of(routed, len(ids), reason, kept, retractions)
    if read is False:
        return None
    logprobs = [struct.unpack("f", struct.pack("f", min(float(e[0]), 0.0)))[0] for e in entries]
    return ids, logprobs, reason, kept, read


def experts_of(routed: Any, tokens: int, reason: str, kept: list[Any], retractions: int) -> Any:
    """The second layer's experts by row; None for a row that is missing, or for no routes; False: to be refused."""
    if routed is not None and type(routed) is not str:
        return False
    if reason == "abort" and (routed is None or not kept):
        return None
    if routed is None or not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", routed) or len(routed) % 4:
        return False
    data = base64.b64decode(routed)
    rows = len(PROMPT) + tokens - 1
    if len(data) != rows * 2 * 2 * 4 or base64.b64encode(data).decode()[:-1] != routed[:-1]:
        # What is left of the last character's bits is not looked at.
        return False if len(data) != rows * 16 else _rows(data, rows, kept, retractions)
    return _rows(data, rows, kept, retractions)


def _rows(data: bytes, rows: int, kept: list[Any], retractions: int) -> Any:
    read: list[tuple[int, int] | None] = []
    for row in range(rows):
        one, other = struct.unpack_from("<2i", data, row * 16 + 8)
        if (one, other) == (0, 0):
            read.append(None)
            continue
        if one == other or not (0 <= one < 4 and 0 <= other < 4):
            return False
        read.append((one, other))
    if all(row is None for row in read):
        return False
    if retractions > 0:
        last = len(PROMPT) - 1 + kept[-1][1] if len(kept) > 1 else 0
        read[:last] = [None] * last
    return read


def as_read(found: Completion) -> tuple[Any, ...]:
    """In the form of `read_strictly`, as the trainer keeps it."""
    sample = as_sample(Prompt("p", "", PROMPT, "", ""), 0, found)
    spans = [(v.version, v.start - len(PROMPT), v.end - len(PROMPT)) for v in sample.versions]
    experts = None
    if found.trace is not None:
        experts = [
            tuple(map(int, ids)) if present else None
            for ids, present in zip(found.trace.experts[:, 0], found.trace.present, strict=True)
        ]
    ids, logprobs = sample.response_ids.tolist(), sample.rollout_logprobs[len(PROMPT) :].tolist()
    return ids, logprobs, sample.finish_reason, spans, experts


# ---- the decoder


def check_decoder(found: Any) -> None:
    wanted = read_strictly(found)
    try:
        completion = read_completion(
            found,
            where="here",
            prompt_tokens=len(PROMPT),
            max_new_tokens=LONGEST,
            vocab_size=VOCAB,
            versions=VERSIONS,
            routes=SPEC,
        )
    except RolloutError as error:
        refusal = str(error)
    else:
        assert as_read(completion) == wanted
        return
    assert wanted is None, f"refused: {refusal}"
    assert len(refusal) < 600


@FEW
@given(spoilt())
def test_a_spoilt_answer_is_refused_or_read_right(found: Any) -> None:
    check_decoder(found)


@pytest.mark.slow
@MANY
@given(spoilt())
def test_ten_thousand_spoilt_answers_are_refused_or_read_right(found: Any) -> None:
    check_decoder(found)


def test_good_answers_are_accepted() -> None:
    """Else a decoder that refuses everything would pass."""
    for found in GOOD:
        assert read_strictly(found) is not None
        check_decoder(found)


# ---- the transport, over a socket


class Scripted:
    """An HTTP server that answers with the bytes it is given, or with a good answer, and a client of it."""

    def __init__(self) -> None:
        self.loop = BackgroundLoop()
        self.reply = b""
        self.server = self.loop.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        port = self.server.sockets[0].getsockname()[1]
        self.client = SGLangClient(f"http://127.0.0.1:{port}", deadline=20.0)

    def ask(self, reply: bytes) -> Completion:
        """Raises RolloutError."""
        self.reply = reply
        return self.loop.run(
            self.client.generate(
                PROMPT, max_new_tokens=LONGEST, temperature=1.0, vocab_size=VOCAB, versions=VERSIONS, routes=SPEC
            )
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))  # type: ignore[index]
                writer.write(self.reply)
                await writer.drain()
                if self.reply != GOOD_REPLY:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        self.loop.run(self.client.close())
        self.server.close()
        self.loop.close()


def reply(status: bytes, headers: list[bytes], body: bytes, length: int | None) -> bytes:
    if length is not None:
        headers = [*headers, b"Content-Length: %d" % length]
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", b""]) + body


JSON = b"Content-Type: application/json"
BODY = json.dumps(GOOD[0]).encode()
GOOD_REPLY = reply(b"200 OK", [JSON], BODY, len(BODY))
KINDS = [
    b"text/html",
    b"text/plain",
    b"",
    b"application/json; charset=utf-16",
    b"application/jsonl",
    b"\xff\xfe",
    b"json",
]
ENCODINGS = [b"gzip", b"deflate", b"br", b"zstd", b"identity", b"x", b"gzip, gzip"]
STATUSES = [
    b"200 OK",
    b"200",
    b"302 Found",
    b"301 -",
    b"204 -",
    b"206 -",
    b"304 -",
    b"401 -",
    b"429 -",
    b"500 -",
    b"503 -",
]
STATUSES += [b"100 Continue", b"999 -", b"99 -", b"2000 -", b"abc", b"\xff"]


@st.composite
def replies(draw: st.DrawFn) -> tuple[bytes, bytes | None]:
    """The bytes on the wire; and the body, where it must be looked at: all else must be refused."""
    body = json.dumps(draw(spoilt())).encode()
    status, headers, length = b"200 OK", [JSON], len(body)
    legal = True
    kind = draw(st.sampled_from(["body", "bytes", "status", "type", "encoding", "length", "wire"]))
    if kind == "bytes":
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + draw(st.integers(0, 3)) :]
        length = len(body)
    elif kind == "status":
        status = draw(st.sampled_from(STATUSES))
        headers = [*headers, b"Location: /generate"]
        legal = status in (b"200 OK", b"200")
    elif kind == "type":
        headers = [b"Content-Type: " + draw(st.sampled_from(KINDS))]
        legal = b"charset" in headers[0]
    elif kind == "encoding":
        encoding = draw(st.sampled_from(ENCODINGS))
        packed = gzip.compress(body)
        at = draw(st.integers(0, len(packed) - 1))
        packed = packed[:at] + draw(st.binary(min_size=1, max_size=2)) + packed[at + 1 :]
        # A damage to gzip's header may leave the body whole.
        headers, length = [*headers, b"Content-Encoding: " + encoding], len(packed)
        return reply(status, headers, packed, length), body if encoding == b"gzip" else None
    elif kind == "length":
        length = draw(st.sampled_from([None, 0, len(body) - 1, len(body) + 1, 10**12, -1]))
        legal = length is None
    whole = reply(status, headers, body, length)
    if kind == "wire":
        at = draw(st.integers(0, len(whole) - len(body)))
        return whole[:at] + draw(st.binary(min_size=1, max_size=4)) + whole[at + draw(st.integers(0, 4)) :], None
    return whole, body if legal else None


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


def check_transport(scripted: Scripted, wire: bytes, body: bytes | None) -> None:
    """One spoilt reply, and after it a good one, which must not suffer from it."""
    tries, client_module.MAX_TRIES = client_module.MAX_TRIES, 1
    try:
        completion = scripted.ask(wire)
    except RolloutError:
        pass
    else:
        if body is None:  # spoilt so that nothing can be said of it but that it holds one of these whole
            assert any(as_read(completion) == read_strictly(good) for good in GOOD)
        else:
            assert as_read(completion) == read_strictly(json.loads(body))
    finally:
        client_module.MAX_TRIES = tries
    assert as_read(scripted.ask(GOOD_REPLY)) == read_strictly(GOOD[0])


@FEW
@given(reply=replies())
def test_a_spoilt_reply_is_an_error_or_read_right_and_the_next_one_is_heard(
    scripted: Scripted, reply: tuple[bytes, bytes | None]
) -> None:
    check_transport(scripted, *reply)


@pytest.mark.slow
@MANY
@given(reply=replies())
def test_ten_thousand_spoilt_replies_are_errors_or_read_right(
    scripted: Scripted, reply: tuple[bytes, bytes | None]
) -> None:
    check_transport(scripted, *reply)


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (reply(b"302 Found", [JSON, b"Location: /generate"], BODY, len(BODY)), "status 302"),
        (reply(b"200 OK", [b"Content-Type: text/html"], BODY, len(BODY)), "content of type 'text/html'"),
        (reply(b"200 OK", [], BODY, len(BODY)), "content of type 'none'"),
        (
            reply(b"200 OK", [JSON, b"Content-Encoding: gzip"], b"\x1f\x8b" + BODY, 2 + len(BODY)),
            "the answer is damaged",
        ),
        (reply(b"200 OK", [JSON], BODY[:-30], len(BODY) - 30), "the answer is not JSON"),
    ],
)
def test_a_reply_that_is_no_answer_is_named_at_once(scripted: Scripted, wire: bytes, message: str) -> None:
    with pytest.raises(RolloutError, match=message) as caught:
        scripted.ask(wire)
    assert "tried" not in str(caught.value)
