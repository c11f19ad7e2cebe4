"""Runs of the command line in processes that are forked from one that has imported everything: a run starts in a tenth
of a second, and is a process like any other, with ranks, signals and an exit status.

As a program this file is that one process. It reads requests from its standard input, one JSON object a line, and
writes a line for each process that starts or ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass
class Run:
    """One run's ranks. `status` is None for a rank that still runs, and -n for one that signal n ended."""

    pids: list[int]
    status: list[int | None]
    log: Path

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text()


class ForkServer:
    def __init__(self, directory: Path) -> None:
        """Logs go into `directory`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._runs: list[Run] = []
        self._answer()  # it is ready

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self._runs:
            for pid, status in zip(run.pids, run.status, strict=True):
                if status is None:
                    os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, *arguments: str | Path, ranks: int = 1, patch: str = "", seconds: float = 0.0) -> Run:
        """`megatron-rl arguments`, on so many ranks, with one of PATCHES below."""
        log = self._directory / f"run-{len(self._runs)}"
        for ending in (".out", ".err"):
            log.with_suffix(ending).touch()
        request = {
            "arguments": [str(a) for a in arguments],
            "ranks": ranks,
            "log": str(log),
            "patch": patch,
            "seconds": seconds,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        while "pids" not in (answer := self._answer()):
            pass
        run = Run(answer["pids"], [None] * ranks, log)
        self._runs.append(run)
        return run

    def wait(self, run: Run, timeout: float = 120.0) -> Run:
        deadline = time.monotonic() + timeout
        while None in run.status:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{run.stderr[-2000:]}"
            self._answer(0.2)
        return run

    def run(self, *arguments: str | Path, ranks: int = 1, patch: str = "", seconds: float = 0.0) -> Run:
        return self.wait(self.start(*arguments, ranks=ranks, patch=patch, seconds=seconds))

    def poll(self, run: Run) -> bool:
        """Whether any rank still runs."""
        self._answer(0.0)
        return None in run.status

    def _answer(self, timeout: float = 60.0) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            return {}
        line = self._process.stdout.buffer.raw.readline()  # type: ignore[attr-defined]
        assert line, "the fork server has ended"
        answer = json.loads(line)
        for run in self._runs:
            if answer.get("ended") in run.pids:
                run.status[run.pids.index(answer["ended"])] = answer["status"]
        return answer


# ---- the process that forks ------------------------------------------------------------------------------------


def serve() -> None:
    from megatron_rl.engine.device import use_device

    use_device("cpu")
    import datasets  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import megatron_rl.sft
    import megatron_rl.train  # noqa: F401

    _say({"ready": os.getpid()})
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.buffer.raw.readline()
            if not line:
                return
            request = json.loads(line)
            port = _free_port()
            _say({"pids": [_fork(request, rank, port) for rank in range(request["ranks"])]})
        _reap()


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{request['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        if request["ranks"] > 1:
            world = str(request["ranks"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if request["patch"]:
            PATCHES[request["patch"]](request["seconds"])
        status = _command_line(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _slow_steps(seconds: float) -> None:
    """All optimizer steps after the first take so long, and say so."""
    import time

    from megatron_rl.loop.trainer import Trainer

    update = Trainer.update
    steps = []

    def slow(*arguments: Any, **options: Any) -> Any:
        if steps:
            print("slow step", flush=True)
            time.sleep(seconds)
        steps.append(1)
        return update(*arguments, **options)

    Trainer.update = slow  # type: ignore[method-assign]


def _made_up_rollouts(seconds: float) -> None:
    """No servers: answers are made up. With `seconds`, the second rollout takes so long, and says so."""
    import asyncio
    import contextlib

    from dynamic_worker import MadeUp, NoServers

    from megatron_rl.loop import connections, parts, publisher
    from megatron_rl.rollout.background import BackgroundLoop

    class Leader(MadeUp):
        def __init__(self) -> None:
            self._loop = BackgroundLoop()

        def sample(self, prompts: Any, sampling: Any) -> Any:
            if seconds and max(sampling.versions) == 1:
                print("slow rollout", flush=True)
                self._loop.run(asyncio.sleep(seconds))
            return super().sample(prompts, sampling)

    parts.connect = lambda _, trainer: contextlib.nullcontext(  # type: ignore
        connections.Servers(None, Leader() if trainer.place.leads_replica else None)
    )
    publisher.WeightSync = NoServers  # type: ignore[assignment,misc]


PATCHES = {"slow steps": _slow_steps, "made-up rollouts": _made_up_rollouts}


def _command_line(arguments: list[str]) -> int:
    import traceback

    from megatron_rl.cli import main

    sys.argv = ["megatron-rl", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(message: dict[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


if __name__ == "__main__":
    serve()
