"""SGLang servers forked from one process that has imported SGLang, so that a start does not import it again.

A start then takes 3 s of processor time instead of 12. Everything else is as in a real start: the same tether, process
group, environment and output, and the same main module. All workers of a test run share the process.

As a program this file is that process. It starts when the first server is asked for, and serves requests on the
listening socket that it inherits. It never computes anything, because a fork would hang after OpenMP threads have run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import psutil
from forked_module import fork_module
from paths import ROOT, SUPPORT

VARIABLE = "TEST_SGLANG_FORKS"
"""Environment variable with the process number of the test run. The process that forks ends with it."""
MODULE = "megatron_rl.rollout.sglang_cpu"
READ_BY_IMPORTS = {"SGLANG_RETURN_ORIGINAL_LOGPROB"}
"""Environment variables that SGLang reads while it is imported. A server with one of them is not forked."""


def forking(real: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a stand-in for `_start` of megatron_rl.rollout.server, which is `real`."""

    def start(command: list[str], environment: dict[str, str], output: BinaryIO | None) -> Any:
        if command[:4] != [sys.executable, "-P", "-m", MODULE] or READ_BY_IMPORTS & os.environ.keys():
            return real(command, environment, output)
        return ForkedServer(command, environment, 1 if output is None else output.fileno())

    return start


def _connect() -> socket.socket:
    """Connects to the process that forks. Starts it if there is none."""
    address = f"\0megatron-rl-sglang-{os.environ[VARIABLE]}"  # exists only while a process listens
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except ConnectionRefusedError:
            connection.close()
        with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):  # another process was quicker
            listener.bind(address)
            listener.listen(16)
            _start_forking(listener.fileno())
        time.sleep(0.01)


def _start_forking(listener: int) -> None:
    from megatron_rl.rollout.server import ServerOptions, sglang_command

    _, environment = sglang_command(ServerOptions(Path("any"), device="cpu", threads=1), has_gpu=False)
    subprocess.Popen(
        [sys.executable, __file__, str(listener)],
        env={**os.environ, **environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"},
        pass_fds=[listener],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class ForkedServer:
    """Stands in for the subprocess.Popen of a server."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], output: int) -> None:
        from megatron_rl.rollout.server import TORCHRUN_VARIABLES

        inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
        tether, end = os.pipe()
        request = {"command": list(command), "environment": {**inherited, **environment}, "directory": os.getcwd()}
        self._connection = _connect()
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], [tether, output])
        os.close(tether)
        self.stdin = os.fdopen(end, "wb")
        self.returncode: int | None = None
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status


# ---- the process that forks ------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    _import_sglang()
    connected: list[socket.socket] = []
    running: dict[int, socket.socket] = {}  # by tether, who asked for it
    while psutil.pid_exists(int(os.environ[VARIABLE])):
        for ready in select.select([listener, *connected], [], [], 0.05)[0]:
            if ready is listener:
                connected.append(listener.accept()[0])
            elif (request := _receive(ready)) is None:
                connected.remove(ready)
                ready.close()
            else:
                pid = _fork(*request, not_for_it=[listener, *connected])
                running[pid] = ready
                ready.sendall(f"{pid}\n".encode())
        for pid in [pid for pid in running if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):  # it may be gone
                running.pop(pid).sendall(f"{status}\n".encode())
    os._exit(0)  # skips the teardown of all imports


def _receive(connection: socket.socket) -> tuple[dict[str, Any], int, int] | None:
    data, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
    while data and not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    return (json.loads(data), files[0], files[1]) if data else None


def _import_sglang() -> None:
    from megatron_rl.garbage import collect_rarely
    from megatron_rl.rollout.sglang_cpu import install_stand_ins

    collect_rarely()
    install_stand_ins()
    for module in ("entrypoints.http_server", "managers.scheduler", "managers.detokenizer_manager", "models.registry"):
        importlib.import_module(f"sglang.srt.{module}")
    gc.freeze()


def _fork(request: dict[str, Any], tether_end: int, output: int, not_for_it: list[socket.socket]) -> int:
    if pid := os.fork():
        os.close(tether_end)
        os.close(output)
        return pid
    status = 70
    try:
        os.setsid()
        for each in not_for_it:
            each.close()
        for number, file in ((0, tether_end), (1, output), (2, output)):
            os.dup2(file, number)
        os.chdir(request["directory"])
        _set_environment(request["environment"])
        status = _run_tether(request["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it is remembered


def _run_tether(command: list[str]) -> int:
    from megatron_rl.rollout import tether

    sys.argv = ["tether", *command]
    popen: Any = SimpleNamespace(
        Popen=ForkedCommand, **{n: getattr(subprocess, n) for n in ("DEVNULL", "TimeoutExpired")}
    )
    tether.subprocess = popen
    return tether.main()


class ForkedCommand:
    """Stands in for the subprocess.Popen of the command that a tether holds: the main module of a server."""

    def __init__(self, command: Sequence[str], stdin: int, env: dict[str, str], preexec_fn: Callable[[], None]) -> None:
        def first() -> None:
            preexec_fn()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _set_environment(env)

        self._pid = fork_module(MODULE, command[4:], first)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(MODULE, timeout)
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
