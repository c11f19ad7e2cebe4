"""Connections to a small real HTTP server: what a cancelled request leaves behind."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from megatron_rl.rollout.transport import Connections

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + b"x" * 4000


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers slowly and in two parts, so that a request can be cancelled at every point."""
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
def test_a_cancelled_request_leaves_no_connection_that_serves_no_more(turns: int) -> None:
    """Cancelled after so many turns of the event loop, from before the connection is made until it answers."""

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
