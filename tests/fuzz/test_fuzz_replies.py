"""Randomly damaged replies over a socket: a RolloutError or a correct answer; the next reply is then read correctly."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Iterator

import pytest
from fuzzing import FEW, MANY
from hypothesis import given
from hypothesis import strategies as st
from spoilt_answers import GOOD, LONGEST, PROMPT, SPEC, VERSIONS, VOCAB, as_read, read_strictly, spoilt

from megatron_rl.rollout import client as client_module
from megatron_rl.rollout.answers import Completion, RolloutError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient


class Scripted:
    """An HTTP server that answers with given bytes or with a good answer, and its client."""

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
    """Draws the bytes on the wire, and the body if it may be accepted; otherwise the reply must be refused."""
    body = json.dumps(draw(spoilt())).encode()
    status, headers = b"200 OK", [JSON]
    length: int | None = len(body)
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
        # Damage to gzip's header may leave the body intact.
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
    """Sends a damaged reply and then a good one, which must be accepted."""
    tries, client_module.MAX_TRIES = client_module.MAX_TRIES, 1
    try:
        completion = scripted.ask(wire)
    except RolloutError:
        pass
    else:
        if body is None:  # an accepted reply must then contain one of these bodies unchanged
            assert any(as_read(completion) == read_strictly(good) for good in GOOD)
        else:
            assert as_read(completion) == read_strictly(json.loads(body))
    finally:
        client_module.MAX_TRIES = tries
    assert as_read(scripted.ask(GOOD_REPLY)) == read_strictly(GOOD[0])


@FEW
@given(reply=replies())
def test_a_damaged_reply_does_not_affect_the_next_reply(scripted: Scripted, reply: tuple[bytes, bytes | None]) -> None:
    check_transport(scripted, *reply)


@pytest.mark.slow
@MANY
@given(reply=replies())
def test_many_damaged_replies_do_not_affect_the_next_reply(
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
def test_a_wrong_reply_is_an_error_without_a_retry(scripted: Scripted, wire: bytes, message: str) -> None:
    with pytest.raises(RolloutError, match=message) as caught:
        scripted.ask(wire)
    assert "tried" not in str(caught.value)
