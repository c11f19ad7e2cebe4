"""If a rank is suspended or killed, the others name it and end within seconds. A rank that is only busy is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from forks import Forks
from heartbeat_worker import STALL
from paths import SUPPORT
from rl_runs import environment, torchrun, write_config

from megatron_rl.errors import LostRankError
from megatron_rl.lab.run import read_metrics
from megatron_rl.ranks import watcher
from megatron_rl.ranks.heartbeat import _listening_host

SECONDS = 5.0
SCENARIOS = ("stop-0", "stop-1", "kill-0", "kill-1", "hold", "raise", "hang", "slow")


@pytest.fixture(scope="module")
def played(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which heartbeat_worker.py left the results of all scenarios."""
    out = tmp_path_factory.mktemp("heartbeat")
    worlds = forks.start(SUPPORT / "heartbeat_worker.py", str(SECONDS), out, *SCENARIOS)
    try:
        assert forks.wait(worlds).returncode == 0, worlds.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worlds.pids[0], signal.SIGKILL)
    return out


def ends(played: Path, scenario: str) -> tuple[list[int], list[tuple[int, float]], list[str]]:
    """Returns pids, (status, seconds after the fault) and standard error, each by rank."""
    pids, found = json.loads((played / f"{scenario}.json").read_text())
    said = [(played / scenario / f"stderr-{rank}").read_text() for rank in (0, 1)]
    return pids, [tuple(end) for end in found], said


@pytest.mark.distributed
@pytest.mark.parametrize(("fault", "victim"), [("stop", 0), ("stop", 1), ("kill", 0), ("kill", 1)])
def test_the_surviving_rank_names_the_lost_rank_and_ends(played: Path, fault: str, victim: int) -> None:
    pids, found, said = ends(played, f"{fault}-{victim}")
    (status, seconds), (victims_status, victims_seconds) = found[1 - victim], found[victim]
    assert status == LostRankError.status
    assert seconds < (3 * SECONDS if fault == "stop" else SECONDS) + 2
    how = {"stop": "has (been stopped, by a signal|not been heard from)", "kill": "has ended before the others"}[fault]
    name = rf"rank {victim} on host {re.escape(socket.gethostname())} \(pid {pids[victim]}\)"
    assert re.search(f"^error: {name} {how}", said[1 - victim], re.MULTILINE)
    assert (played / f"{fault}-{victim}" / f"flushed-{1 - victim}").exists() or "Traceback" not in said[1 - victim]
    assert (victims_status, said[victim]) == (-signal.SIGKILL, "")  # the lost rank is killed too
    assert victims_seconds < seconds + watcher.END_SECONDS + 5


@pytest.mark.distributed
def test_a_rank_that_holds_the_gil_is_not_declared_lost(played: Path) -> None:
    _, found, said = ends(played, "hold")
    assert [status for status, _ in found] == [0, 0], said
    assert min(seconds for _, seconds in found) > 2 * SECONDS
    assert "error" not in "".join(said)


@pytest.mark.distributed
def test_ranks_that_raise_print_their_own_errors(played: Path) -> None:
    _, found, said = ends(played, "raise")
    assert [status for status, _ in found] == [2, 2]
    assert said == ["error: an error of rank 0\n", "error: an error of rank 1\n"]
    assert found[1][1] < 2 < found[0][1]  # rank 0 went on after rank 1 had ended


@pytest.mark.distributed
def test_a_rank_that_never_comes_to_a_collective_is_named_with_its_phase(played: Path) -> None:
    pids, found, said = ends(played, "hang")
    assert [status for status, _ in found] == [LostRankError.status] * 2
    assert max(seconds for _, seconds in found) < 3 * STALL
    host = re.escape(socket.gethostname())
    for rank in (0, 1):
        (line,) = said[rank].splitlines()
        assert re.match(r"error: nothing has moved for \d s, more than engine.stall: ", line)
        assert re.search(rf"rank 1 on host {host} \(pid {pids[1]}\) in rewards \(.*\) for \d s", line)
        assert re.search(rf"rank 0 on host {host} \(pid {pids[0]}\) in update \(.*\) for \d s", line)
        assert (played / "hang" / f"flushed-{rank}").exists()


@pytest.mark.distributed
def test_ranks_that_wait_for_a_slow_rank_which_moves_are_not_hung(played: Path) -> None:
    _, found, said = ends(played, "slow")
    assert [status for status, _ in found] == [0, 0], said
    assert min(seconds for _, seconds in found) > STALL
    assert "".join(said) == ""


# Real runs


def write_sft(directory: Path, model: Path) -> Path:
    (directory / "train.jsonl").write_text(
        "".join(f'{{"prompt": "{i}+1=", "response": "{i + 1}"}}\n' for i in range(64))
    )
    path = directory / "sft.yaml"
    path.write_text(
        f"run_dir: {directory / 'run'}\nmodel: {{path: {model}}}\nengine: {{device: cpu, dtype: fp32, heartbeat: 3}}\n"
        f"data: {{train: {directory / 'train.jsonl'}, max_tokens: 64}}\nbatch_size: 8\nsteps: 100000\n"
    )
    return path


def stop_a_rank(command: list[str], metrics: Path, victim: str) -> set[int]:
    """Suspends a rank once a line of metrics is written, and checks that the run ends with an error naming the rank.

    Returns the process groups of the run's servers.
    """
    stderr = metrics.parents[1] / "stderr"
    with stderr.open("wb") as stream:
        run = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=stream)
    while not (metrics.exists() and metrics.stat().st_size):
        assert run.poll() is None, stderr.read_text(errors="replace")[-3000:]
        time.sleep(0.1)
    ranks = {rank.environ()["RANK"]: rank for rank in psutil.Process(run.pid).children()}
    servers = {
        child.pid for rank in ranks.values() for child in rank.children() if "tether" in " ".join(child.cmdline())
    }
    ranks[victim].suspend()
    stopped = time.monotonic()
    assert run.wait(timeout=60) == LostRankError.status
    assert time.monotonic() - stopped < 30  # the launcher and the watcher wait 10 s for the stopped rank to end
    assert not any(rank.is_running() for rank in ranks.values())
    assert_told(stderr.read_text(errors="replace"), victim, ranks[victim].pid, metrics)
    return servers


def assert_told(said: str, victim: str, pid: int, metrics: Path) -> None:
    name = rf"rank {victim} on host {re.escape(socket.gethostname())} \(pid {pid}\)"
    assert re.search(f"^error: {name} has (been stopped|not been heard from)", said, re.MULTILINE), said[-3000:]
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


@pytest.mark.distributed
def test_a_suspended_rank_ends_the_training_run(forks: Forks, tiny_model_dir: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    run = forks.start("-m", "megatron_rl", "sft", write_sft(tmp_path, tiny_model_dir), ranks=2)
    while not (metrics.exists() and metrics.stat().st_size):
        assert forks.poll(run), run.stderr[-3000:]
        time.sleep(0.1)
    os.kill(run.pids[1], signal.SIGSTOP)
    assert forks.wait(run, timeout=30).status == [LostRankError.status, -signal.SIGKILL]
    assert_told(run.stderr, "1", run.pids[1], metrics)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
def test_servers_end_when_rank_0_is_suspended(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "rl.yaml", tiny_model_dir, tmp_path / "unused")
    options = [
        f"run_dir={tmp_path / 'run'}",
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        "train.steps=1000",
        "engine.heartbeat=3",
    ]
    command = torchrun(2, "-m", "megatron_rl", "train", str(config), *options)
    servers = stop_a_rank(command, tmp_path / "run" / "metrics.jsonl", "0")
    assert servers
    deadline = time.monotonic() + 10
    while any(processes_of(server) for server in servers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [server for server in servers if processes_of(server)]


def processes_of(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


# Watchers without ranks: the hub is a process, and each rank a connection


class Peer:
    """A connection to the hub that acts as the watcher of a rank."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, hello: str) -> Peer:
        peer = cls(*await asyncio.open_connection("127.0.0.1", port))
        peer.say(hello)
        return peer

    def say(self, line: str) -> None:
        self.writer.write(f"{line}\n".encode())

    async def until(self, word: str) -> str:
        """Returns the first line that starts with the word, or "" if the hub closed the connection."""
        while line := await asyncio.wait_for(self.reader.readline(), 20):
            if line.decode().startswith(word):
                return line.decode().strip()
        return ""

    async def beat(self, state: str = "S") -> None:
        while True:
            self.say(f"beat {state}")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def hub(ranks: int, seconds: float = 2.0) -> AsyncIterator[tuple[Any, int]]:
    """Yields (process, port) of a hub; this process acts as its rank 0."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "megatron_rl.ranks.watcher"],
        env=environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    members = [f"rank {rank} on host h{rank} (pid {rank})" for rank in range(ranks)]
    settings = {"rank": 0, "seconds": seconds, "host": "127.0.0.1", "port": 0, "token": "secret", "members": members}
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    port = (await process.stdout.readline()).decode().split()[1]
    assert await process.stdout.readline() == b"ready\n"
    try:
        yield process, int(port)
    finally:
        if process.returncode is None:
            process.stdin.write(b"done\n")
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:  # after a failed test its peers may still beat
                process.kill()
                await process.wait()


def test_all_ranks_learn_which_rank_sends_no_heartbeat() -> None:
    async def play() -> None:
        async with hub(3) as (process, port):
            first, second = [await Peer.connect(port, f"secret {rank}") for rank in (1, 2)]
            beating = asyncio.create_task(first.beat())
            second.say("beat S")  # and never again
            told = await first.until("lost")
            assert told.startswith("lost 0 rank 2 on host h2 (pid 2) has not been heard from for ")
            assert told.endswith("s; its host or its network is gone, or it is stopped")
            assert (await process.stdout.readline()).decode().strip() == told
            beating.cancel()
            process.stdin.write(b"done\n")

    asyncio.run(play())


def test_a_rank_may_reconnect_after_its_connection_breaks() -> None:
    async def play() -> None:
        async with hub(2) as (_, port):
            for _ in range(3):
                peer = await Peer.connect(port, "secret 1")
                beating = asyncio.create_task(peer.beat())
                await asyncio.sleep(1.0)
                beating.cancel()
                peer.writer.transport.abort()
            peer = await Peer.connect(port, "secret 1")
            peer.say("ended nothing")
            assert await peer.until("lost") == "lost 0 rank 1 on host h1 (pid 1) has ended before the others"

    asyncio.run(play())


def test_the_hub_rejects_connections_that_are_not_from_ranks() -> None:
    async def play() -> None:
        async with hub(2) as (_, port):
            rank = await Peer.connect(port, "secret 1")
            beating = asyncio.create_task(rank.beat())
            for hello in ("guess 1", "secret 7", "secret -1", "secret", "GET / HTTP/1.1", "x" * 9000):
                stranger = await Peer.connect(port, hello)
                stranger.say("ended nothing")
                with pytest.raises((ConnectionResetError, AssertionError)):
                    assert await stranger.until("")
            assert (await rank.until("beat")) == "beat"
            beating.cancel()

    asyncio.run(play())


def test_no_rank_is_declared_lost_after_the_machine_slept() -> None:
    async def play() -> None:
        async with hub(2) as (process, port):
            peer = await Peer.connect(port, "secret 1")
            beating = asyncio.create_task(peer.beat())
            await asyncio.sleep(0.3)
            os.kill(process.pid, signal.SIGSTOP)
            beating.cancel()  # the whole machine sleeps
            await asyncio.sleep(5.0)
            os.kill(process.pid, signal.SIGCONT)
            beating = asyncio.create_task(peer.beat())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.until("lost"), 4.0)
            beating.cancel()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("host", "resolves_to", "listens"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "localhost"),
        ("node-0", "127.0.1.1", "0.0.0.0"),  # many machines resolve their own name like this
        ("service", "192.0.2.1", "0.0.0.0"),  # not an address of this machine
        ("node-1", "0.0.0.0", "node-1"),  # stands for an address that other machines reach
    ],
)
def test_the_hub_listens_on_an_address_that_other_ranks_can_reach(
    monkeypatch: pytest.MonkeyPatch, host: str, resolves_to: str, listens: str
) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolves_to, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert _listening_host(host) == listens


def test_a_finished_rank_is_not_declared_lost() -> None:
    async def play() -> None:
        async with hub(3, seconds=3.0) as (process, port):  # on a busy machine a beat may come a second late
            one, two = [await Peer.connect(port, f"secret {rank}") for rank in (1, 2)]
            one.say("done")
            beating = asyncio.create_task(two.beat())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(two.until("lost"), 6)
            process.stdin.write(b"done\n")
            assert await two.until("over") == "over"
            beating.cancel()

    asyncio.run(play())
