"""A server that answers the first request of each connection alone, and two requests that a cut cable ends:

cut_requests.py serve HOST PORT, or cut_requests.py ask URL FILE, which ends once both requests have failed
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def serve(host: str, port: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await reader.read()

    async with await asyncio.start_server(answer, host, int(port)) as server:
        await server.serve_forever()


async def ask(url: str, cut: str) -> None:
    """Says "ready", waits until the file `cut` is there, and writes the seconds from then to each request's failure."""
    from megatron_rl.rollout.client import SGLangClient, UnreachableError

    async with SGLangClient(url, idle_seconds=600.0) as before, SGLangClient(url, idle_seconds=600.0) as after:
        for client in (before, after):
            await client.model_info()
        sent = asyncio.create_task(before.end_weight_update())
        await asyncio.sleep(1.0)  # the server's machine has the request
        print("ready", flush=True)
        while not Path(cut).exists():
            await asyncio.sleep(0.05)
        start = time.monotonic()

        async def seconds(call: Coroutine[Any, Any, None] | asyncio.Task[None]) -> float:
            try:
                await call
            except UnreachableError as error:
                print(error, flush=True)
                return time.monotonic() - start
            raise AssertionError("answered")

        print(json.dumps(await asyncio.gather(seconds(sent), seconds(after.end_weight_update()))), flush=True)


if __name__ == "__main__":
    asyncio.run({"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:]))
