"""No rank starts the next rollout before all servers hold the new weights; it would sample from the old ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks


@pytest.mark.distributed
def test_every_rank_waits_until_all_servers_hold_the_weights(forks: Forks, tmp_path: Path) -> None:
    forks.world(2, "order_worker:main", tmp_path / "pushed")
