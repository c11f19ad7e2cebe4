"""Runs an event loop in a thread of its own.

The synchronous trainer can then keep connections open between calls, and wait for servers while it broadcasts to them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")
WAKE_SECONDS = 1.0
"""Python runs a signal's handler only once the main thread wakes. A signal does not wake it if the kernel gives it to
another thread, or if it comes a moment before the wait begins."""
CLOSE_SECONDS = 5.0


class BackgroundLoop:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for the coroutine and returns its result; an interrupted wait cancels it."""
        (result,) = results([self.start(coroutine)])
        return result

    def close(self) -> None:
        """Cancels what still runs and gives it a moment to clean up."""
        self.start(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def finished(value: T) -> Future[T]:
    """Returns an answer that is there already."""
    answer: Future[T] = Future()
    answer.set_result(value)
    return answer


def results(answers: Sequence[Future[T]]) -> list[T]:
    """Waits for all. Raises the error of the first that fails, and cancels the others, as an interrupted wait does."""
    waiting: set[Future[T]] = set(answers)
    try:
        while waiting:
            done, waiting = wait(waiting, WAKE_SECONDS, FIRST_EXCEPTION)
            for answer in done:
                answer.result()
        return [answer.result() for answer in answers]
    finally:
        for answer in answers:
            answer.cancel()  # does nothing to one that is done


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_SECONDS)
