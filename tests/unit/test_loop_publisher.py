"""What the publisher does at each weight sync, and in which order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from megatron_rl.data.versions import Versions
from megatron_rl.loop.gpu_turns import GpuTurns
from megatron_rl.loop.publisher import Publisher
from megatron_rl.weights.all_servers import WeightSyncError


class Recorded:
    """Stands for sync, members and leader; notes each call, and the versions that servers may answer with by then."""

    def __init__(self, versions: Versions, refuses: bool = False) -> None:
        self.calls: list[Any] = []
        self.newcomers = {"c"}
        self.ejected = {"a": "does not pause", "c": "was dead"}
        self._versions = versions
        self._refuses = refuses

    def _note(self, what: str) -> dict[str, float]:
        self.calls.append((what, [version for version in range(9) if version in self._versions]))
        return {what: 1.0}

    def choose(self, sync: object) -> None:
        self._note("choose")

    def admit(self, sync: object, *, newcomers: bool) -> None:
        self._note("admit newcomers" if newcomers else "admit")

    def pause(self, *, tell: bool) -> None:
        self._note("pause" if tell else "")

    def resume(self, *, tell: bool) -> None:
        self._note("resume" if tell else "")

    def leave_out(self, lost: dict[str, str]) -> None:
        self._note(f"leave out {lost}")

    def push(self, version: int) -> dict[str, float]:
        if self._refuses:
            raise WeightSyncError("refused")
        return self._note("push")

    def verify_if_due(self, version: int) -> dict[str, float]:
        return self._note("verify")


def make(lag: int, refuses: bool = False) -> tuple[Publisher, Recorded]:
    versions = Versions(3, lag)
    made: Any = Recorded(versions, refuses)
    phase: Callable[[str], Any] = lambda _: contextlib.nullcontext()  # noqa: E731
    turns = GpuTurns(made, made, made, shares=False)
    return Publisher(versions, made, made, turns, made, tells=True, phase=phase), made


def test_new_weights_count_once_servers_have_them_and_newcomers_are_used_once_they_are_verified() -> None:
    publisher, made = make(lag=0)
    assert publisher.publish(4) == {"push": 1.0, "verify": 1.0}
    before, after = [3], [4]
    assert made.calls == [
        ("choose", before),
        ("push", before),
        ("admit", before),
        ("verify", after),
        ("admit newcomers", after),
    ]


def test_rollouts_that_go_on_are_paused_until_the_new_version_counts() -> None:
    """A server that does not pause gets no weights: its requests would go on with keys and values of the old ones."""
    publisher, made = make(lag=2)
    publisher.publish(4)
    before, after = [1, 2, 3], [2, 3, 4]
    assert made.calls == [
        ("choose", before),
        ("pause", before),
        ("leave out {'a': 'does not pause'}", before),
        ("push", before),
        ("admit", before),
        ("resume", after),
        ("verify", after),
        ("admit newcomers", after),
    ]


def test_a_failed_sync_leaves_no_server_paused() -> None:
    """They may run elsewhere, for the next run too."""
    publisher, made = make(lag=1, refuses=True)
    with pytest.raises(WeightSyncError, match="refused"):
        publisher.publish(4)
    assert made.calls[-1] == ("resume", [2, 3])
