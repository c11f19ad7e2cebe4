"""Finds out that nothing moves on any rank, and says who waits for whom. Imports only the standard library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 6
"""Groups of ranks, and servers, that a message names: it must fit a line of the watchers."""


class Stall:
    """The latest note of each rank (ranks.activity), and the seconds since any of them has changed."""

    def __init__(self, limit: float | None, members: Sequence[str]) -> None:
        """`members`: each rank's name in messages."""
        self._limit = limit
        self._members = members
        self._running = set(range(len(members)))
        self._notes: dict[int, Mapping[str, Any]] = {}
        self._still = 0.0

    def heard(self, rank: int, note: Mapping[str, Any]) -> None:
        if note["moves"] != self._notes.get(rank, {}).get("moves"):
            self._still = 0.0
        self._notes[rank] = note

    def done(self, rank: int) -> None:
        self._running.discard(rank)
        self._notes.pop(rank, None)
        self._still = 0.0

    def passed(self, seconds: float) -> str:
        """Counts the seconds; returns who waits for whom if the limit is passed, and "" before."""
        if self._limit is None or not self._running or self._notes.keys() < self._running:
            return ""  # some rank has not begun
        self._still += seconds
        return self._describe() if self._still > self._limit else ""

    def _describe(self) -> str:
        groups: dict[str, list[int]] = defaultdict(list)
        owed: dict[str, tuple[int, float]] = {}
        for rank, note in sorted(self._notes.items()):
            groups[note["doing"]].append(rank)
            for server, count, seconds in note["owed"]:
                before = owed.get(server, (0, 0.0))
                owed[server] = (before[0] + count, max(before[1], seconds))
        said = []
        for doing, ranks in sorted(groups.items(), key=lambda group: len(group[1]))[:SHOWN]:  # few wait for many
            who = self._members[ranks[0]] if len(ranks) == 1 else f"ranks {_shorten(ranks)}"
            said.append(f"{who} in {doing} for {max(self._notes[rank]['seconds'] for rank in ranks):.0f} s")
        for server, (count, seconds) in sorted(owed.items(), key=lambda each: -each[1][1])[:SHOWN]:
            said.append(f"{server} owes {count} answer{'s' if count > 1 else ''}, the first for {seconds:.0f} s")
        left = max(0, len(groups) - SHOWN) + max(0, len(owed) - SHOWN)
        more = f"; and {left} more" if left else ""
        return f"nothing has moved for {self._still:.0f} s, more than engine.stall: {'; '.join(said)}{more}"


def _shorten(ranks: Sequence[int]) -> str:
    """Numbers as `0, 2-5`; the first ones if there are many."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
