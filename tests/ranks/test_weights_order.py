"""No rank goes on to the next rollout before all servers hold the weights: it would sample from the old ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from paths import SUPPORT
from rl_runs import environment, torchrun


@pytest.mark.distributed
def test_every_leader_waits_for_the_servers(tmp_path: Path) -> None:
    command = torchrun(2, str(SUPPORT / "order_worker.py"), str(tmp_path / "pushed"))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
