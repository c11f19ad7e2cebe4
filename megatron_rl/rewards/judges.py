"""Worker processes that run verifiers, so that one which hangs or crashes costs its answer and not the run.

A worker is killed when an answer takes too long: nothing less ends a long computation in C. What passes between the
processes is JSON, in the messages of multiprocessing's connections.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from types import TracebackType
from typing import Any

import orjson

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.registry import RewardError

START_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Failure:
    """No verdict: the verifier raised, or (`lost`) its process took too long or died."""

    reason: str
    lost: bool = False


class Judges:
    """Up to `workers` processes for each verifier, started when there is something to judge, until `close`.

    A context manager. It serves one thread at a time.
    """

    def __init__(self, workers: int = 4, deadline: float = 10.0) -> None:
        """`deadline`: seconds for one answer."""
        self._workers = workers
        self._deadline = deadline
        self._pools: dict[str, list[_Worker]] = {}

    def judge(self, verifier: str, answers: Sequence[Answer]) -> list[Verdict | Failure]:
        """Raises RewardError when the verifier does not exist or its process does not start."""
        pool = self._pools.setdefault(verifier, [])
        while len(pool) < min(self._workers, len(answers)):
            pool.append(_Worker(verifier))
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in pool:
            idle.put(worker)

        def ask(answer: Answer) -> Verdict | Failure:
            worker = idle.get()
            try:
                return worker.ask(answer, self._deadline)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(pool) or 1) as threads:
            return list(threads.map(ask, answers))

    def close(self) -> None:
        for worker in (worker for pool in self._pools.values() for worker in pool):
            worker.stop()
        self._pools.clear()

    def __enter__(self) -> Judges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process with one verifier, started anew after it was killed or died."""

    def __init__(self, verifier: str) -> None:
        self._verifier = verifier
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "megatron_rl.rewards.worker", self._verifier, str(theirs.fileno())]
        # A user's verifier is found wherever this process finds it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Nothing is written to standard input: that it closes tells the worker that this process has ended.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._ready = False

    def stop(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.communicate()

    def ask(self, answer: Answer, deadline: float) -> Verdict | Failure:
        self._wait_until_ready()
        try:
            self._connection.send_bytes(orjson.dumps(asdict(answer)))
            reply = self._receive(deadline)
        except (EOFError, OSError):
            reply = None
            failure = Failure(f"its process ended with exit status {self._process.wait()}", lost=True)
        else:
            failure = Failure(f"took over {deadline:g} s", lost=True)
        if reply is None:
            self.stop()
            self._start()
            return failure
        return Failure(reply["error"]) if "error" in reply else Verdict(**reply)

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            reply = self._receive(START_SECONDS) or {"error": f"no answer in {START_SECONDS:g} s"}
        except (EOFError, OSError):
            reply = {"error": f"its process ended with exit status {self._process.wait()}"}
        if "error" in reply:
            raise RewardError(f"{reply['error']} (in the process that runs verifier {self._verifier!r})")
        self._ready = True

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """None when the time has passed."""
        return orjson.loads(self._connection.recv_bytes()) if self._connection.poll(seconds) else None
