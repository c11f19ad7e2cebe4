"""Runs one command, and kills all its descendants when it ends or when the trainer is gone.

    python keeper.py DESCRIPTOR COMMAND [ARGUMENT]...

DESCRIPTOR is passed on to the command.

Standard input is a pipe whose other end the trainer holds open. The kernel closes it whenever the trainer ends, even by
kill -9. Descendants that left the process group or lost their parent are found too, because this process adopts them
(PR_SET_CHILD_SUBREAPER). Stopped descendants are killed as well. It imports only the standard library, so it starts at
once. rollout/tether.py uses the process group instead, which is enough for a server, as a server runs no user code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def children(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # State and parent follow the command's name, which may hold any characters.
            if int(file.read().rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def kill_descendants() -> None:
    """Kills children until none is left; the children of a killed child become children of this process."""
    while found := children(os.getpid()):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main() -> int:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    descriptor = int(sys.argv[1])
    child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, pass_fds=[descriptor], start_new_session=True)
    os.close(descriptor)  # so that the trainer sees when the child closes it
    watched = select.poll()
    watched.register(os.pidfd_open(child.pid), select.POLLIN)
    watched.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    watched.poll()
    status = child.poll()
    kill_descendants()
    return 1 if status is None else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
