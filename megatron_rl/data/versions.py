"""Weight versions: those that generated a sample's tokens, and those that servers may hold."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a sample were generated under this weight version."""

    version: int
    start: int
    end: int


def first_spans(spans: Sequence[VersionSpan], count: int) -> tuple[VersionSpan, ...]:
    """Returns the spans of the first `count` tokens."""
    return tuple(VersionSpan(span.version, span.start, min(span.end, count)) for span in spans if span.start < count)


class Versions(Container[int]):
    """The weight versions that a server may answer with: the newest one, and `lag` before it."""

    def __init__(self, newest: int, lag: int = 0) -> None:
        self.newest = newest
        self.lag = lag

    @property
    def oldest(self) -> int:
        return max(0, self.newest - self.lag)

    def __contains__(self, version: object) -> bool:
        return isinstance(version, int) and self.oldest <= version <= self.newest

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"
