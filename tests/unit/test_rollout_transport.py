"""Connections to a small real HTTP server: cancelled and broken requests, lost hosts, and the cost of a request."""

from __future__ import annotations

import asyncio
import cProfile
import socket
import struct
import sys
from collections.abc import Callable

import httpx
import pytest

from megatron_rl.rollout.client import SGLangClient, UnreachableError
from megatron_rl.rollout.fleet import MISSES, PROBE_SECONDS
from megatron_rl.rollout.transport import Connections

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + b"x" * 4000


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers slowly in two parts, so that a request can be cancelled at every point."""
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.002)
            writer.write(REPLY[:2000])
            await writer.drain()
            await asyncio.sleep(0.002)
            writer.write(REPLY[2000:])
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("turns", range(24))
def test_a_cancelled_request_leaves_no_broken_connection(turns: int) -> None:
    """Cancels the request after `turns` turns of the event loop: from before the connection is made to the answer."""

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with httpx.AsyncClient(
            transport=Connections(), base_url=f"http://127.0.0.1:{port}", timeout=None
        ) as http:
            cancelled = asyncio.create_task(http.get("/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            async with asyncio.timeout(10.0):
                assert len((await http.get("/")).content) == 4000
        server.close()

    asyncio.run(run())


@pytest.mark.parametrize(("idle_seconds", "opened"), [(60.0, 1), (0.0, 2)])
def test_a_connection_is_used_again_unless_it_was_idle_for_long(idle_seconds: float, opened: int) -> None:
    accepted: list[asyncio.StreamWriter] = []

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        await serve(reader, writer)

    async def run() -> None:
        server = await asyncio.start_server(count, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(transport=Connections(idle_seconds), base_url=url, timeout=None) as http:
            await http.get("/")
            await asyncio.sleep(0.01)
            await http.get("/")
        server.close()

    asyncio.run(run())
    assert len(accepted) == opened


@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's options of a socket")
def test_a_host_that_is_lost_is_noticed_as_soon_as_by_signs_of_life() -> None:
    """While a server takes weights nobody asks it for any. What the options do: tests/faults/test_two_nodes.py."""

    async def run() -> tuple[int, ...]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(transport=Connections(), base_url=url, timeout=None) as http:
            connection = (await http.get("/")).extensions["network_stream"].get_extra_info("socket")
            options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT
            found = tuple(connection.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        server.close()
        return found

    idle, interval, count, unacknowledged = asyncio.run(run())
    longest = MISSES * 2 * PROBE_SECONDS
    assert 0 < idle + interval * count <= longest
    assert 0 < unacknowledged <= 1000 * longest


def test_the_error_of_a_broken_connection_has_the_systems_reason() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async def run() -> None:
        server = await asyncio.start_server(reset, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with SGLangClient(url) as client:
            with pytest.raises(UnreachableError, match="ReadError Connection reset by peer; tried 1 times"):
                await client.end_weight_update()
        server.close()

    asyncio.run(run())


async def calls_of_each(requests: int, transport: httpx.AsyncBaseTransport) -> float:
    """Returns the number of function calls per request, with `requests` requests at a time."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=None) as http:
        profile = cProfile.Profile()
        profile.enable()
        await asyncio.gather(*(http.get("/") for _ in range(requests)))
        profile.disable()
    server.close()
    return sum(entry.callcount for entry in profile.getstats()) / requests


def test_the_cost_of_a_request_does_not_grow_with_their_number() -> None:
    """httpx's own pool visits all its connections whenever a request starts or ends."""

    def growth(transport: Callable[[], httpx.AsyncBaseTransport]) -> float:
        few, many = (asyncio.run(calls_of_each(requests, transport())) for requests in (10, 60))
        return many / few

    asyncio.run(calls_of_each(1, httpx.AsyncHTTPTransport()))  # the imports of the first request are not counted
    assert growth(Connections) < 1.2
    everything = httpx.Limits(max_connections=None)
    assert growth(lambda: httpx.AsyncHTTPTransport(limits=everything)) > 2  # so the count can detect growth
