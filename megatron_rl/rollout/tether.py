"""Runs a command, and ends it with all its descendants when the process that started it is gone.

    python -m megatron_rl.rollout.tether COMMAND [ARGUMENT]...

Standard input is the tether: a pipe whose other end the parent holds open. The kernel closes it whenever the parent
ends, even by kill -9 and even while the server is importing. PR_SET_PDEATHSIG alone is not enough: it fires when the
parent's starting thread ends, and SGLang's own use of it leaves a gap at start-up. The whole process group is killed,
so the caller must start this process as the leader of a new group.

The command gets its own TMPDIR. Its files and its shared memory are removed at the end, because a killed server does
not clean up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LOOK_SECONDS = 10.0
KILL_SECONDS = 10.0
SOCKET_PATH = 100
"""Longest TMPDIR in bytes: SGLang makes sockets in it, and Linux limits their paths to 107 bytes."""
SHARED_MEMORY = ("sglang_", "sgl_", "psm_", "sem.mp-")
"""Prefixes of shared memory of SGLang and Python's multiprocessing. NCCL removes its own."""
PR_SET_PDEATHSIG = 1


class ServerProcesses:
    """The other processes of this process group, and the shared memory that they have mapped."""

    def __init__(self) -> None:
        self._shared: set[str] = set()

    def look(self) -> None:
        """Records the memory that is mapped now; after the end of a process its owner cannot be found."""
        for pid in self._members():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    name = line.rpartition("/dev/shm/")[2]
                    if name != line and name.startswith(SHARED_MEMORY) and "/" not in name:
                        self._shared.add(name.removesuffix(" (deleted)"))

    def kill(self) -> None:
        deadline = time.monotonic() + KILL_SECONDS
        while (members := self._members()) and time.monotonic() < deadline:
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def clean(self) -> None:
        for name in self._shared:
            Path("/dev/shm", name).unlink(missing_ok=True)

    def _members(self) -> list[int]:
        import psutil

        found = []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                ours = pid != os.getpid() and os.getpgid(pid) == os.getpid()
                if ours and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
        return found


def _kill_group_when_cut(group: ServerProcesses) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    group.look()
    group.kill()


def _end_with_tether() -> None:
    """Makes the command's process end if the tether is killed. Called in that process."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _temporary_directory() -> str:
    path = tempfile.mkdtemp(prefix="sglang-")
    if len(path) + len("/tmp12345678") <= SOCKET_PATH:
        return path
    os.rmdir(path)
    return tempfile.mkdtemp(prefix="sglang-", dir="/tmp")


def main() -> int:
    if os.getpgrp() != os.getpid():
        sys.exit("tether: not the leader of a process group; its end would be that of the caller's group")
    directory = _temporary_directory()
    group = ServerProcesses()
    try:
        child = subprocess.Popen(
            sys.argv[1:],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": directory},
            preexec_fn=_end_with_tether,
        )
        threading.Thread(target=_kill_group_when_cut, args=(group,), daemon=True).start()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(LOOK_SECONDS)
            group.look()
    finally:
        group.kill()
        group.clean()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
