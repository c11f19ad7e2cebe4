"""torchrun as `launch` starts it: its ranks may save before they end, and its status says how they ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rl_runs import environment

from megatron_rl.rollout.server import free_ports
from megatron_rl.stop import STATUS

SAVES = f"""
import os, signal, sys, time
def told(number, frame):
    time.sleep(2.0)  # saves
    sys.exit({STATUS})
signal.signal(int(sys.argv[1]), told)
os.write(1, b"ready\\n")
time.sleep(600)
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(600)
"""


def start(script: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    script.write_text(text)
    (port,) = free_ports(1)
    master = ("--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port))
    words = [
        sys.executable,
        "-m",
        "megatron_rl.ranks.torchrun",
        *master,
        "--nproc-per-node",
        "2",
        str(script),
        *arguments,
    ]
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.distributed
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_its_status_says_that_the_run_was_stopped_and_saved(tmp_path: Path, number: signal.Signals) -> None:
    agent = start(tmp_path / "saves.py", SAVES, str(int(number)))
    assert agent.stdout is not None
    assert [agent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    agent.send_signal(number)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode == STATUS, told
    assert "Traceback" not in told


@pytest.mark.distributed
def test_its_status_is_that_of_the_rank_that_failed(tmp_path: Path) -> None:
    agent = start(tmp_path / "fails.py", FAILS)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode == 7, told
    assert "rank 1 ended with status 7; its output says why" in told


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_a_signal_ended_before_it_could_save_counts_as_stopped(tmp_path: Path) -> None:
    agent = start(tmp_path / "starts.py", SAVES, str(int(signal.SIGTERM)))
    assert agent.stdout is not None
    assert [agent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    agent.send_signal(signal.SIGUSR1)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode == STATUS, told
