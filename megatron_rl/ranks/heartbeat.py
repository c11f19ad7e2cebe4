"""Ends a run when a rank is stopped, is killed or loses its host, and names that rank; or when nothing moves any more.

gloo and NCCL notice such a rank only after half an hour, and control groups only after two days (ranks.place). So each
rank starts a watcher (ranks.watcher), a small process that sends a heartbeat; rank 0's watcher receives all of them.
When a rank is lost, every other rank prints which and why, writes what it holds, and ends with LostRankError.status
within seconds. A collective cannot be interrupted, so the rank ends by os._exit. A rank that hangs even then is killed
by its watcher. Servers that rank 0 launched end with rank 0 (rollout.tether). A rank that hangs in a collective while
its process lives is found by what all ranks note of their activity: when none of it moves, the run ends alike.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType

import orjson
import torch.distributed as dist

from megatron_rl.errors import LostRankError, UserError
from megatron_rl.ranks.activity import Activity
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes
from megatron_rl.ranks.stall import Stall
from megatron_rl.ranks.watcher import interval

LEAVE_SECONDS = 5.0
"""Seconds that a finished rank waits for its watcher to finish."""
NOTICE_SECONDS = 2.0
"""Seconds that a rank waits to hear which rank was lost after its collective failed."""


class HeartbeatError(UserError):
    """The watchers of the ranks cannot reach each other."""


class Heartbeat:
    """Watches the ranks of a world while its context lasts.

    If a rank leaves with an exception, the others have watcher.ERROR_SECONDS to end too.
    """

    def __init__(self, control: dist.ProcessGroup, seconds: float | None, activity: Activity | None = None) -> None:
        """Starts the watchers, unless the world has one rank. Collective over `control`, which spans the world.

        A rank is lost after `seconds` without a heartbeat; None disables. The run is hung after `activity.stall`
        seconds in which no rank's activity moves. Raises HeartbeatError on every rank if one cannot be watched.
        """
        self.before_end: Callable[[], None] = lambda: None
        """Called before a loss ends this rank. It runs outside the main thread, which may hang."""
        self._rank = control.rank()
        self._process: subprocess.Popen[bytes] | None = None
        self._leaving = threading.Event()
        self._lost = threading.Event()
        self._why = ""
        self._thread: threading.Thread | None = None
        stall = activity.stall if activity else None
        if (seconds or stall) and control.size() > 1:
            problem = self._start(control, seconds, stall)
            problems = [each.decode() for each in all_gather_bytes(problem.encode(), control)]
            for rank, each in enumerate(problems):
                if each:
                    self._tell("done")
                    raise HeartbeatError(
                        f"engine.heartbeat: rank {rank} {each}. Open the ports between the machines, give "
                        "torchrun the address of rank 0's machine as MASTER_ADDR, or disable it: engine.heartbeat: null"
                    )
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        if activity is not None and stall:
            threading.Thread(target=self._follow, args=(activity, stall), daemon=True).start()

    def _follow(self, activity: Activity, stall: float) -> None:
        """Tells the watcher what this rank does; a rank alone, which has none, counts by itself."""
        alone, pause = Stall(stall, [_name(self._rank)]), interval(stall)
        while not self._leaving.wait(pause):
            if not activity.has_begun:
                continue
            note = activity.note()
            if self._process is not None:
                self._tell(f"note {orjson.dumps(note).decode()}")
                continue
            alone.heard(0, note)
            if why := alone.passed(pause):
                self._end(why)

    def _start(self, control: dist.ProcessGroup, seconds: float | None, stall: float | None) -> str:
        """Returns what went wrong, "" if nothing did."""
        members = [each.decode() for each in all_gather_bytes(_name(self._rank).encode(), control)]
        settings = {"rank": self._rank, "seconds": seconds, "stall": stall, "members": members}
        answer, hub = "", {"host": _hub_host(), "port": 0, "token": secrets.token_hex(16)}
        if self._rank == 0:
            answer = self._start_watcher({**settings, **hub, "host": _listening_host(_hub_host())})
            word, _, rest = answer.partition(" ")
            hub["port"] = int(rest) if word == "listening" else 0
        hub = orjson.loads(broadcast_bytes(orjson.dumps(hub), control))
        if not hub["port"]:
            return answer.removeprefix("failed ")
        answer = self._answer() if self._rank == 0 else self._start_watcher(settings | hub)
        return "" if answer == "ready" else answer.removeprefix("failed ") or "lost its watcher as it started"

    def _start_watcher(self, settings: dict[str, object]) -> str:
        """Returns the first answer of the new watcher."""
        command = [sys.executable, "-m", "megatron_rl.ranks.watcher"]
        # A session of its own: a signal to the rank's process group must not reach the watcher, which reports it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._tell(orjson.dumps(settings).decode())
        return self._answer()

    def _answer(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended, which _listen notices
                self._process.stdin.write(f"{line}\n".encode())

    def _listen(self) -> None:
        while line := self._answer():
            word, _, rest = line.partition(" ")
            if word == "over":
                return
            seconds, _, self._why = rest.partition(" ")
            self._lost.set()
            if not self._leaving.wait(float(seconds)):
                self._end(self._why)
        if not self._leaving.is_set():
            self._end(f"the heartbeat of rank {self._rank} has ended: its process was killed")

    def _end(self, why: str) -> None:
        print(f"error: {_message(why)} (said by rank {self._rank})", file=sys.stderr, flush=True)
        try:
            self.before_end()
        finally:
            os._exit(LostRankError.status)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises LostRankError instead of the error of a collective that failed because a rank was lost."""
        self._leaving.set()
        # If this thread held the last reference to a process group at exit, the interpreter would abort.
        self.before_end = lambda: None
        if self._process is None:
            return
        if error is None:
            self._tell("done")
            if self._thread is not None:
                self._thread.join(LEAVE_SECONDS)
            return
        self._tell("leaving")
        assert self._process.stdin is not None
        os.dup(self._process.stdin.fileno())  # so that the pipe stays open until this process ends
        if isinstance(error, RuntimeError) and self._lost.wait(NOTICE_SECONDS):
            raise LostRankError(_message(self._why)) from error


def _name(rank: int) -> str:
    return f"rank {rank} on host {socket.gethostname()} (pid {os.getpid()})"


def _message(why: str) -> str:
    return f"{why}. The run ends; a training run goes on from its last checkpoint with --resume"


def _hub_host() -> str:
    """Returns the address at which all ranks reach rank 0's machine."""
    on_one_machine = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")
    return "127.0.0.1" if on_one_machine else os.environ.get("MASTER_ADDR", "127.0.0.1")


def _listening_host(host: str) -> str:
    """Returns the address that rank 0's watcher listens on: `host` if other ranks reach it there, else all interfaces.

    Other ranks may not reach `host`: many machines resolve their own name to 127.0.1.1, and a cluster may give the
    address of a service.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            loops = ipaddress.ip_address(address[0]).is_loopback
    except OSError:
        return "0.0.0.0"
    return "0.0.0.0" if loops and host not in (address[0], "localhost") else host
