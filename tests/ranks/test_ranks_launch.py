"""Ranks that a tool starts on this machine: all end if one fails.

tests/runs/test_run_output.py sees where they listen.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from rl_runs import environment, torchrun

from megatron_rl.ranks.launch import launch, main

RANK_FAILS = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == 1:
    sys.exit(7)
open(sys.argv[1] + str(rank), "w").write(str(os.getpid()))
time.sleep(600)
"""
ONE_IS_TOLD = """
import os, signal, sys, time
def told(number, frame):
    open(sys.argv[1] + os.environ["RANK"], "w").write(str(number))
    sys.exit(5)
signal.signal(signal.SIGTERM, told)
os.write(1, b"ready\\n")
time.sleep(600)
"""


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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_each_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    """A closed terminal too: the ranks have no terminal."""
    script = tmp_path / "told.py"
    script.write_text(ONE_IS_TOLD)
    command = torchrun(2, str(script), str(tmp_path / "told-"))
    launcher = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup may have started the tests
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == 5
    assert {file.name: file.read_text() for file in tmp_path.glob("told-*")} == {"told-0": "15", "told-1": "15"}


@pytest.mark.parametrize("words", [[], ["2"], ["two", "x.py"], ["0", "x.py"], ["-m", "x"], ["9" * 6000, "x.py"]])
def test_words_that_say_no_number_of_ranks_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "expected RANKS, from 1 to 1024" in capsys.readouterr().err
