"""Times the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PREFIX = "time/"


def time_of(phase: str) -> str:
    """Returns the name of the metric that has the phase's seconds. It has no space, as some dashboards want."""
    return PREFIX + phase.replace(" ", "_")


class PhaseTimer:
    """Sums the seconds of each phase until they are drained. Works on every rank.

    It reads the host's monotonic clock, so work that CUDA has queued counts in the phase that waits for it. A phase
    inside another counts in both.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self, name: str) -> dict[str, float]:
        """Returns {"time/<name>": seconds} of one phase, and removes it from the next drain."""
        return {time_of(name): self._seconds.pop(name)}

    def drain(self) -> dict[str, float]:
        """Returns {"time/<phase>": seconds} since the last drain, in the order in which the phases first ended."""
        drained = {time_of(name): seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return drained
