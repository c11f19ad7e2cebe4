"""Notes of what ranks do, and when nothing in them moves."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from megatron_rl.ranks.activity import Activity
from megatron_rl.ranks.stall import Stall
from megatron_rl.ranks.watcher import LONGEST_LINE


def note(moves: int, doing: str = "update", owed: Any = ()) -> dict[str, Any]:
    return {"moves": moves, "doing": doing, "seconds": 5.0, "owed": list(owed)}


def test_a_move_of_any_rank_starts_the_clock_again() -> None:
    stall = Stall(10.0, ["rank 0", "rank 1"])
    stall.heard(0, note(1))
    assert stall.passed(100.0) == ""  # rank 1 has not begun
    stall.heard(1, note(1))
    assert stall.passed(9.0) == ""
    stall.heard(1, note(2))
    stall.heard(0, note(1))
    assert stall.passed(9.0) == ""
    assert stall.passed(2.0).startswith("nothing has moved for 11 s")


def test_ranks_that_are_done_are_not_waited_for() -> None:
    stall = Stall(10.0, ["rank 0", "rank 1"])
    stall.done(1)
    assert stall.passed(11.0) == ""
    stall.heard(0, note(1, "export"))
    assert "rank 0 in export" in stall.passed(11.0)
    stall.done(0)
    assert stall.passed(100.0) == ""


def test_without_a_limit_nothing_is_ever_hung() -> None:
    stall = Stall(None, ["rank 0"])
    stall.heard(0, note(1))
    assert stall.passed(1e9) == ""


def test_the_fewest_ranks_come_first_and_what_servers_owe_is_added_up() -> None:
    stall = Stall(1.0, [f"rank {rank} on host h" for rank in range(6)])
    for rank in (0, 1, 2, 5, 4):
        stall.heard(rank, note(1, owed=[["http://a:1", 2, 4.0], ["http://b:1", 1, 30.0]] if rank < 2 else ()))
    stall.heard(3, note(1, "rewards"))
    assert stall.passed(2.0) == (
        "nothing has moved for 2 s, more than engine.stall: rank 3 on host h in rewards for 5 s; ranks 0-2, 4-5 in "
        "update for 5 s; http://b:1 owes 2 answers, the first for 30 s; http://a:1 owes 4 answers, the first for 4 s"
    )


def test_the_message_of_many_ranks_fits_a_line_of_the_watchers() -> None:
    stall = Stall(1.0, [f"rank {rank} on host {'h' * 64} (pid 4194304)" for rank in range(2048)])
    for rank in range(2048):
        servers = [[f"http://{'s' * 193}", 256, 1e5]] * 8
        stall.heard(rank, note(1, f"old log-probs (engine/layers/{rank}.py:100 function)", servers))
    message = stall.passed(2.0)
    assert "and 2042 more" in message
    assert len(message.encode()) + 20 < LONGEST_LINE
    assert len(json.dumps(note(10**9, "x" * 200, servers)).encode()) + 20 < LONGEST_LINE


def test_an_activity_tells_phase_place_and_what_is_owed() -> None:
    now = [100.0]
    activity = Activity(10.0, clock=lambda: now[0])
    found: list[dict[str, Any]] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(activity.note()))
        thread.start()
        thread.join()

    look()
    with activity.phase("rollout"):
        now[0] = 110.0
        with activity.owed_by("http://a:1"), activity.owed_by("http://a:1"):
            now[0] = 130.0
            look()
        with pytest.raises(ValueError, match="refused"), activity.owed_by("http://b:1"):
            raise ValueError("refused")
    look()
    moves, doing, seconds, owed = (list(each) for each in zip(*(each.values() for each in found), strict=True))
    assert [text.partition(" (")[0] for text in doing] == ["between phases", "rollout", "between phases"]
    assert seconds == [0.0, 30.0, 0.0]
    assert owed == [[], [["http://a:1", 2, 20.0]], []]
    assert moves == [0, 1, 4]  # begin; two answers and the end, and no failure
