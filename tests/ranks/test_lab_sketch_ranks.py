"""Metrics of the mergeable accumulator, all-reduced over real ranks."""

from __future__ import annotations

import pytest
from forks import Forks
from sketch_worker import accumulate


@pytest.mark.distributed
def test_all_reduce_gives_every_rank_the_complete_metrics(forks: Forks) -> None:
    assert forks.world(2, "sketch_worker:reduce") == [accumulate().finalize()] * 2
