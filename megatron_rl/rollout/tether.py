"""Runs a command and ends it, with all its descendants, when the process that started it is gone.

    python -m megatron_rl.rollout.tether COMMAND [ARGUMENT]...

Standard input is the tether: a pipe whose other end the parent holds open. The kernel closes it however the parent
ends, kill -9 included, and at any time, while the server is still importing too. PR_SET_PDEATHSIG would not do: it
fires when the parent's starting thread ends, and SGLang's own use of it leaves a gap at start-up. What is killed is
the process group, so the caller starts this process as the leader of a new one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _kill_group_when_cut() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    if os.getpgrp() != os.getpid():
        sys.exit("tether: not the leader of a process group; its end would be that of the caller's group")
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_kill_group_when_cut, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
