"""Ranks and runs of the command line, forked from one process that has imported everything.

A world of four ranks then starts in a tenth of a second instead of 18. Each rank is a normal process, with signals
and an exit status. Only its end differs from a real rank: atexit hooks do not run.

As a program this file is that one process. It reads the names of request files from its standard input and writes a
JSON line for each rank that starts or ends. It never computes anything, because a fork would hang after OpenMP or gloo
threads have run.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paths import ROOT, SUPPORT

from megatron_rl.garbage import collect_rarely

HOST = "127.0.0.1"
GRACE_SECONDS = 10.0
"""Seconds until a rank is killed if it does not end after another rank failed."""


@dataclass
class Job:
    """The work of every rank of a world: `command`, as after `python`, or a function call."""

    ranks: int
    log: Path
    command: Sequence[str]
    call: tuple[str, tuple[Any, ...]] | None
    before: Sequence[tuple[Any, ...]]
    environment: Mapping[str, str]
    joins: bool
    """Whether the ranks get the environment variables of a world."""
    directory: Path | None


@dataclass
class Run:
    """The ranks of one world. `status` is None for a running rank, and -n for a rank ended by signal n."""

    pids: list[int]
    status: list[int | None]
    log: Path
    store: Any = field(repr=False)
    """Serves the ranks' rendezvous while this object lives."""

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text()

    @property
    def returncode(self) -> int:
        """The first status of a failed rank, or 0."""
        assert None not in self.status
        return next((status for status in self.status if status), 0)


class Forks:
    def __init__(self, directory: Path) -> None:
        """Starts the forking process; logs go into `directory`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self._runs: list[Run] = []
        self._ended: dict[int, int] = {}
        self._started: list[list[int]] = []
        self._ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the forking process, which kills the ranks that still run."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def begin(self, ranks: int, function: str, *arguments: Any) -> Run:
        """Starts `module:function` of tests/support on `ranks` ranks of a gloo world."""
        return self._start(ranks, call=(function, arguments))

    def world(self, ranks: int, function: str, *arguments: Any, timeout: float = 300.0) -> list[Any]:
        """Calls `module:function` as `begin` does; returns what it returned on each rank.

        Raises AssertionError with what the ranks printed if one of them fails.
        """
        run = self.wait(self.begin(ranks, function, *arguments), timeout, together=True)
        assert run.returncode == 0, f"{function} on {ranks} ranks: {run.status}\n{run.stderr[-8000:]}"
        return [pickle.loads(_result(run.log, rank).read_bytes()) for rank in range(ranks)]

    def start(
        self,
        *command: str | Path,
        ranks: int = 1,
        before: Sequence[tuple[Any, ...]] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> Run:
        """Starts `python command` (`-m module ...` or `script.py ...`) on `ranks` ranks; a single rank joins no world.

        `before` lists calls that each rank makes first: (`module:function`, argument, ...).
        """
        return self._start(ranks, [str(word) for word in command], None, before, environment or {}, directory)

    def run(self, *command: str | Path, timeout: float = 240.0, together: bool = False, **options: Any) -> Run:
        """Starts a command as `start` does and waits for its end."""
        return self.wait(self.start(*command, **options), timeout, together=together)

    def run_ranks(self, module: str, arguments: Sequence[str], ranks: int) -> int:
        """Stands in for megatron_rl.ranks.launch.run_ranks."""
        run = self.run("-m", module, *arguments, ranks=ranks, together=True)
        sys.stderr.write(run.stderr)
        return run.returncode

    def wait(self, run: Run, timeout: float = 240.0, together: bool = False) -> Run:
        """Waits for the end of all ranks. With `together`, kills ranks that do not end soon after one has failed."""
        deadline = time.monotonic() + timeout
        failed = None
        while None in run.status:
            if together and failed is None and any(run.status):
                failed = time.monotonic()
            if failed is not None and time.monotonic() > failed + GRACE_SECONDS:
                self.kill(run)
            if time.monotonic() > deadline:
                self.kill(run)
                raise AssertionError(f"still running after {timeout} s:\n{run.stderr[-8000:]}")
            self._hear(0.2)
        run.store = None  # its socket is closed
        return run

    def poll(self, run: Run) -> bool:
        """Returns whether any rank still runs."""
        while self._hear(0.0):
            pass
        return None in run.status

    def _start(
        self,
        ranks: int,
        command: Sequence[str] = (),
        call: tuple[str, tuple[Any, ...]] | None = None,
        before: Sequence[tuple[Any, ...]] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> Run:
        log = self._directory / f"run-{len(self._runs)}"
        for ending in (".out", ".err"):
            log.with_suffix(ending).touch()
        store, port = _store(ranks)
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": HOST}
        world |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
        joins = ranks > 1 or call is not None
        more = {**(world if joins else {}), **(environment or {})}
        job = Job(ranks, log, command, call, before, more, joins, directory)
        log.with_suffix(".job").write_bytes(pickle.dumps(job))
        while not self._ready:
            self._hear(60.0)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{log.with_suffix('.job')}\n".encode())
        while not self._started:
            self._hear(60.0)
        run = Run(self._started.pop(), [None] * ranks, log, store)
        self._runs.append(run)
        self._note()
        return run

    def end(self, run: Run) -> None:
        """Gives ranks a moment to end by themselves, then kills the rest."""
        deadline = time.monotonic() + GRACE_SECONDS
        while None in run.status and time.monotonic() < deadline:
            self._hear(0.2)
        self.kill(run)
        self.wait(run)

    def kill(self, run: Run) -> None:
        """Kills the ranks that still run."""
        for pid, status in zip(run.pids, run.status, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)

    def _hear(self, timeout: float) -> bool:
        """Reads a line of the process, if one comes in time."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return False
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        told = json.loads(line)
        self._ready |= "ready" in told
        if "started" in told:
            self._started.append(told["started"])
        if "ended" in told:
            self._ended[told["ended"]] = told["status"]
            self._note()
        return True

    def _note(self) -> None:
        """Records the statuses of ended ranks. A rank may end before its start is reported."""
        for run in self._runs:
            for rank, pid in enumerate(run.pids):
                if pid in self._ended and run.status[rank] is None:
                    run.status[rank] = self._ended.pop(pid)


def _store(ranks: int) -> tuple[Any, int]:
    """Creates a rendezvous in this process. Its socket is bound only once, so no other process can take the port."""
    import socket

    import torch.distributed as dist

    listener = socket.create_server((HOST, 0), backlog=4 * ranks)
    port = listener.getsockname()[1]
    listen = listener.detach()
    return dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listen), port


def _result(log: Path, rank: int) -> Path:
    return log.with_name(f"{log.name}-rank-{rank}.pickle")


# ---- the process that forks ------------------------------------------------------------------------------------


def serve() -> None:
    collect_rarely()
    _import_everything()
    gc.freeze()  # a collection in a rank would touch, and so copy, the pages of everything that was imported
    _say({"ready": os.getpid()})
    running: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            name = sys.stdin.buffer.raw.readline().decode().strip()  # type: ignore[union-attr]
            if not name:
                break
            job = pickle.loads(Path(name).read_bytes())
            pids = [_fork(job, rank) for rank in range(job.ranks)]
            running |= set(pids)
            _say({"started": pids})
        _reap(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # skips the teardown of all imports, which takes seconds


def _import_everything() -> None:
    """Imports everything that ranks need, so that no rank has to."""
    from megatron_rl.engine.device import use_device

    use_device("cpu")
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    for module in ("train", "sft", "parity", "certify.ranks", "engine.policy", "engine.critic", "cli"):
        importlib.import_module(f"megatron_rl.{module}")

    import sglang_forks

    from megatron_rl.rollout import server

    server._start = sglang_forks.forking(server._start)


def _reap(running: set[int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        running.discard(pid)
        _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def _fork(job: Job, rank: int) -> int:
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(job.log.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        status = _work(job, rank)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _work(job: Job, rank: int) -> int:
    import traceback

    if job.joins:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= job.environment
    if job.directory is not None:
        os.chdir(job.directory)
    try:
        for function, *arguments in job.before:
            _find(function)(*arguments)
        if job.call is None:
            _run_command(list(job.command))
        else:
            result = _call(*job.call)
            _result(job.log, rank).write_bytes(pickle.dumps(result))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _call(function: str, arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    result = _find(function)(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _find(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _run_command(command: list[str]) -> None:
    import runpy
    import warnings

    if command[0] == "-m":
        sys.argv = command[1:]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules")  # it is imported here on purpose
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    # Requests are pickled with the classes of the module `forks`, not of `__main__`.
    importlib.import_module("forks").serve()
