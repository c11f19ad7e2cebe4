"""Deadlines of answers, whose time stands still while the servers are paused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Deadlines:
    """Make all calls from one event loop."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Timeout, float] = {}
        """Seconds that each open deadline had left when the pause began, or when it was opened in the pause."""
        self._paused = False

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Raises TimeoutError if the body takes longer than so many seconds, without those of pauses."""
        async with asyncio.timeout(None if self._paused else seconds) as timeout:
            self._left[timeout] = seconds
            try:
                yield
            finally:
                del self._left[timeout]

    def pause(self) -> None:
        if self._paused:
            return
        self._paused = True
        now = asyncio.get_running_loop().time()
        for timeout in self._open():
            ends = timeout.when()
            if ends is not None:
                self._left[timeout] = ends - now
                timeout.reschedule(None)

    def resume(self) -> None:
        if not self._paused:
            return
        self._paused = False
        now = asyncio.get_running_loop().time()
        for timeout in self._open():
            timeout.reschedule(now + self._left[timeout])

    def _open(self) -> list[asyncio.Timeout]:
        """Returns those that can be moved; one that has expired stays until its body has cleaned up."""
        return [timeout for timeout in self._left if not timeout.expired()]
