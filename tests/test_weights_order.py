"""No rank goes on to the next rollout before all servers hold the weights: it would sample from the old ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.distributed
def test_every_leader_waits_for_the_servers(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).parent / "order_worker.py"
    environment = {**os.environ, "PYTHONPATH": str(worker.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(worker), str(tmp_path / "pushed")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
