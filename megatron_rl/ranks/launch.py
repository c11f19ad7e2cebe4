"""Starts ranks on this machine that no other machine can reach.

    python -m megatron_rl.ranks.launch RANKS -m MODULE [ARGUMENT]...
    python -m megatron_rl.ranks.launch RANKS SCRIPT [ARGUMENT]...

parity, certify, the examples and the tests use it. torchrun's c10d rendezvous listens on all interfaces and unpickles
what anyone writes to its store. Here the store listens on 127.0.0.1, on a socket that is bound once, so no other
process can take its port. gloo and NCCL use the loopback interface. Ranks join the store as if torchrun had made it.
Use torchrun for runs on several machines, and for servers on other machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist

from megatron_rl.config.bounds import MOST_GPUS_OF_A_NODE
from megatron_rl.cores import threads_per_process
from megatron_rl.stop import SIGNALS

HOST = "127.0.0.1"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
POLL_SECONDS = 0.05
PASSED_ON: dict[int, signal.Signals] = {**{number: number for number in SIGNALS}, signal.SIGHUP: signal.SIGTERM}
"""What the ranks are sent for a signal. They are in sessions of their own, so a closed terminal would not end them."""
END_SECONDS = 10.0
"""Seconds that a rank has after SIGTERM before it is killed."""


def run_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Runs `python -m module arguments` on `ranks` local ranks; returns the exit status of `launch`."""
    return launch(["-m", module, *arguments], ranks)


def ask_ranks(module: str, question: Mapping[str, Any], ranks: int, directory: Path) -> Any:
    """Runs `module` on `ranks` local ranks and returns its answer; None if a rank failed.

    Its arguments are two JSON files: one has the question, and rank 0 writes the answer into the other.
    """
    asked, answer = directory / "spec.json", directory / f"world-{ranks}.json"
    asked.write_bytes(orjson.dumps(question))
    if run_ranks(module, [str(asked), str(answer)], ranks) != 0 or not answer.is_file():
        return None
    return orjson.loads(answer.read_bytes())


def launch(command: Sequence[str], ranks: int) -> int:
    """Runs `python command` on `ranks` local ranks and waits for all of them.

    Returns 0, or the status of the first rank that failed (128 + N for signal N); the other ranks are then ended.
    SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks, which may save before they end; so is SIGHUP, as SIGTERM,
    unless nohup has it ignored.
    """
    listener = socket.create_server((HOST, 0), backlog=4 * ranks)
    port = listener.getsockname()[1]
    # The store serves until this function returns.
    store = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    environment = _environment(ranks, port)
    started: list[subprocess.Popen[bytes]] = []
    with _passed_on(started):
        try:
            for rank in range(ranks):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session each: Ctrl-C in a terminal reaches a rank once, through this process.
                started.append(subprocess.Popen([sys.executable, *command], env=own, start_new_session=True))
            return _wait(started)
        finally:
            _end(started)
            del store


def _environment(ranks: int, port: int) -> dict[str, str]:
    threads = 1 if torch.cuda.is_available() else threads_per_process(ranks)
    world = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 makes no store of its own
    }
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **LOOPBACK, **world}


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        statuses = [rank.poll() for rank in ranks]
        for number, status in enumerate(statuses):
            if status:
                who = f"rank {number} (pid {ranks[number].pid})"
                how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                print(f"{who} {how}; the other ranks are ended too", file=sys.stderr, flush=True)
                return status if status > 0 else 128 - status
        if not any(status is None for status in statuses):
            return 0
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Passes signals on to the ranks while the body runs. Does nothing outside the main thread."""

    def send(number: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(PASSED_ON[number])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hears = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    before = {number: signal.signal(number, send) for number in PASSED_ON if hears or number != signal.SIGHUP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the ranks that still run by SIGTERM, and after END_SECONDS by SIGKILL."""
    deadline = time.monotonic() + END_SECONDS
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        try:
            rank.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def main(words: Sequence[str]) -> int:
    """Returns the exit status of the ranks, or 2 if the words do not say how many there are, and of what."""
    ranks = int(words[0]) if words and words[0].isdecimal() and len(words[0]) < 10 else 0
    if not 1 <= ranks <= MOST_GPUS_OF_A_NODE or len(words) < 2:
        print(
            f"error: found {' '.join(words)[:200]!r}, expected RANKS, from 1 to {MOST_GPUS_OF_A_NODE}, and what each "
            "runs: -m MODULE [ARGUMENT]... or SCRIPT [ARGUMENT]...",
            file=sys.stderr,
        )
        return 2
    return launch(words[1:], ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
