"""Ranks that a tool starts on this machine: other machines cannot reach them, and all end if one fails."""

from __future__ import annotations

import ipaddress
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rl_runs import environment, torchrun

from megatron_rl.ranks.launch import launch

RANK_FAILS = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == 1:
    sys.exit(7)
open(sys.argv[1] + str(rank), "w").write(str(os.getpid()))
time.sleep(600)
"""
MEETS = """
import sys, time, torch, torch.distributed as dist
from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.engine.device import use_device
from megatron_rl.ranks.place import start_process_groups, stop_process_groups
place = start_process_groups(Layout.resolve(*parse_layout("tp=2")), use_device("cpu"), seed=0)
total = torch.tensor(1.0 + place.rank)
dist.all_reduce(total, group=place.replica)
open(sys.argv[1] + str(place.rank), "w").write(str(total.item()))
time.sleep(1)
stop_process_groups()
"""
ONE_IS_TOLD = """
import os, signal, sys, time
def told(number, frame):
    open(sys.argv[1] + os.environ["RANK"], "w").write(str(number))
    sys.exit(5)
signal.signal(signal.SIGTERM, told)
print("ready", flush=True)
time.sleep(600)
"""


def listening(root: int) -> set[str]:
    """Returns the addresses on which a process or one of its descendants listens."""
    found: set[str] = set()
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.distributed
def test_ranks_listen_only_on_the_loopback_interface(tmp_path: Path) -> None:
    """With all process groups of a layout; parity and certify start their ranks so."""
    script = tmp_path / "meets.py"
    script.write_text(MEETS)
    command = [sys.executable, "-m", "megatron_rl.ranks.launch", "2", str(script), str(tmp_path / "met-")]
    launcher = subprocess.Popen(command, env=environment())
    seen: set[str] = set()
    most = 0
    while launcher.poll() is None:
        seen |= listening(launcher.pid)
        most = max(most, len(psutil.Process(launcher.pid).children(recursive=True)))
        time.sleep(0.05)
    assert launcher.returncode == 0
    assert {file.read_text() for file in tmp_path.glob("met-*")} == {"3.0"}
    assert most == 2  # its ranks were seen
    assert seen  # so was their store
    assert all(ipaddress.ip_address(address).is_loopback for address in seen), seen


@pytest.mark.distributed
def test_when_one_rank_fails_the_others_end_and_launch_returns_its_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(RANK_FAILS)
    assert launch([str(script), str(tmp_path / "pid-")], 3) == 7
    assert "rank 1 (pid " in (told := capfd.readouterr().err)
    assert "ended with status 7" in told
    assert not [file for file in tmp_path.glob("pid-*") if psutil.pid_exists(int(file.read_text()))]


@pytest.mark.distributed
def test_a_signal_to_the_launcher_reaches_each_rank_once(tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(ONE_IS_TOLD)
    command = torchrun(2, str(script), str(tmp_path / "told-"))
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 5
    assert {file.name: file.read_text() for file in tmp_path.glob("told-*")} == {"told-0": "15", "told-1": "15"}
