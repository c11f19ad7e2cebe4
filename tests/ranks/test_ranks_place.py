"""The threads of process groups: of one run after another in the same world, and of idle groups."""

from __future__ import annotations

import pytest
from forks import Forks


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "layout"), [(1, "dp=1"), (2, "tp=2")])
def test_stopped_groups_leave_no_threads(forks: Forks, ranks: int, layout: str) -> None:
    for threads in forks.world(ranks, "groups_worker:main", layout, 4):
        assert threads[1:] == threads[:1] * 3, threads


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "layout"), [(1, "dp=1"), (2, "tp=2")])
def test_an_idle_rank_seldom_wakes(forks: Forks, ranks: int, layout: str) -> None:
    """The gloo device of a group wakes a hundred times a second; a rank has about thirty groups."""
    for woke in forks.world(ranks, "groups_worker:wakes_while_idle", layout, 1.0):
        assert 0 < woke < 400
