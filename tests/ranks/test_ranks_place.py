"""Process groups of one run after another in the same world."""

from __future__ import annotations

import pytest
from forks import Forks


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "layout"), [(1, "dp=1"), (2, "tp=2")])
def test_stopped_groups_leave_no_threads(forks: Forks, ranks: int, layout: str) -> None:
    for threads in forks.world(ranks, "groups_worker:main", layout, 4):
        assert threads[1:] == threads[:1] * 3, threads
