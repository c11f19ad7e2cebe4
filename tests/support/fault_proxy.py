"""An HTTP proxy in front of a real server that applies one fault to each request, in the given order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx
import orjson


@dataclass(frozen=True)
class Fault:
    """The fault of one request; defaults to no fault."""

    drop: bool = False  # closes the connection before the server is asked
    lose: bool = False  # asks the server, then closes the connection without its answer
    status: int | None = None  # the proxy answers with this status instead of the server
    delay: float = 0.0  # seconds to wait first
    until: Callable[[], bool] = lambda: True  # then waits until this holds
    change: Callable[[dict[str, Any]], Any] | None = None  # changes the answer's JSON in place
    raw: Callable[[bytes], bytes] | None = None  # changes the answer's bytes
    content_type: str | None = None  # replaces the server's
    retry_after: int | None = None  # header of the answer, in seconds


class FaultProxy:
    """Use as an async context manager. `faults` apply to the first requests in order; later requests pass unchanged."""

    def __init__(self, upstream: str, *faults: Fault, port: int = 0, always: Fault | None = None) -> None:
        """`always`: the fault of all later requests for answers."""
        self._upstream = upstream
        self._port = port
        self.faults = list(faults)
        self.always = always
        self.seen: list[tuple[str, Any]] = []  # path and JSON body of each request
        self.most_in_flight = 0
        self._in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(base_url=self._upstream, timeout=60.0)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._http.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            await self._answer(reader, writer)
        finally:
            self._in_flight -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split("\r\n")[0].split(" ")
        lines = (line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        headers = {name.lower(): value for name, value in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.seen.append((path, orjson.loads(body) if body else None))
        later = self.always if self.always is not None and path != "/abort_request" else Fault()
        fault = self.faults.pop(0) if self.faults else later
        await asyncio.sleep(fault.delay)
        while not fault.until():
            await asyncio.sleep(0.01)
        if fault.drop:
            return
        if fault.status is not None:
            status, content = fault.status, b'{"error": {"message": "made up by the proxy"}}'
            kind = "application/json"
        else:
            passed: dict[str, str] = {
                name: headers[name] for name in ("content-type", "authorization") if name in headers
            }
            answer = await self._http.request(method, path, content=body, headers=passed)
            status, content = answer.status_code, _changed(answer.content, fault)
            kind = answer.headers.get("Content-Type", "text/plain")
        if fault.lose:
            return
        kind = fault.content_type or kind
        if fault.retry_after is not None:
            kind += f"\r\nRetry-After: {fault.retry_after}"
        about = f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close"
        writer.write(f"HTTP/1.1 {status} -\r\n{about}\r\n\r\n".encode() + content)
        await writer.drain()


def _changed(content: bytes, fault: Fault) -> bytes:
    if fault.change is not None:
        answer = orjson.loads(content)
        fault.change(answer)
        content = orjson.dumps(answer)
    return fault.raw(content) if fault.raw else content
