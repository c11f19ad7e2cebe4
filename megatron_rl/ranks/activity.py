"""What this rank does at the moment, told to the watcher of a run that may hang (ranks.stall)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


class Activity:
    """Counts what moves, and knows the phases that run and the servers that owe answers. Any thread may use it."""

    def __init__(self, stall: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`stall`: seconds without a move after which the run counts as hung; None: it never does."""
        self.stall = stall
        self.has_begun = False
        """Set once steps begin: what comes before, such as the load of weights, has deadlines of its own."""
        self._clock = clock
        self._moves = 0
        self._phases: list[tuple[str, float]] = []
        self._owed: dict[str, list[float]] = {}  # by server, when each request without an answer was sent
        self._main = threading.main_thread().ident

    def move(self) -> None:
        """Counts an answer, a verdict, a micro-batch, a bucket of weights or the like."""
        self._moves += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append((name, self._clock()))
        self.move()
        try:
            yield
        finally:
            self._phases.pop()
            self.move()

    @contextmanager
    def owed_by(self, server: str) -> Iterator[None]:
        """A request to a server; its answer is a move, and its failure is none."""
        sent, waiting = self._clock(), self._owed.setdefault(server, [])
        waiting.append(sent)
        try:
            yield
            self.move()
        finally:
            waiting.remove(sent)

    def note(self) -> dict[str, Any]:
        """A description as JSON: moves, phase and place in the source, seconds since, and what servers owe."""
        now = self._clock()
        # Copies: other threads go on meanwhile.
        name, since = [("between phases", now), *self._phases][-1]
        waiting = [(server, list(sent)) for server, sent in list(self._owed.items())]
        owed = [[server[:200], len(sent), now - sent[0]] for server, sent in waiting if sent]
        return {"moves": self._moves, "doing": f"{name} ({self._place()})", "seconds": now - since, "owed": owed[:8]}

    def _place(self) -> str:
        """File, line and function of this package that the main thread is in; a collective hangs below it."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "outside of megatron_rl"
