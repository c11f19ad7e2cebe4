"""Ends the requests that another trainer, which was killed, has left on a server."""

from __future__ import annotations

import asyncio
import time

from megatron_rl.rollout.client import RefusedError, SGLangClient

ABANDON_SECONDS = 60.0
"""Time within which the last rank of a killed trainer has ended, and asks for nothing more."""
FLUSH_SECONDS = 5
QUIET_SECONDS = 0.5
"""Time without requests after which no more are to come."""


async def abandon_requests(client: SGLangClient) -> None:
    """Ends all requests in flight, and returns once there are none. Raises RolloutError.

    SGLang notices a closed connection after seconds, and a host that is gone not at all. Ranks of the killed trainer
    that still live ask again at once, so requests are aborted until no more come.
    """
    end = time.monotonic() + ABANDON_SECONDS
    while True:
        await client.abort_requests()
        try:
            await client.flush_cache(FLUSH_SECONDS)
            await asyncio.sleep(QUIET_SECONDS)
            return await client.flush_cache()
        except RefusedError:  # requests are in flight, or another flush waits until there are none
            if time.monotonic() > end:
                raise
            await asyncio.sleep(QUIET_SECONDS)
