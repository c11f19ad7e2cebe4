"""Runs verifiers in worker processes, so that a hang, a crash or a full memory costs one answer and not the run.

A worker is killed if an answer takes too long, because nothing else ends a long computation in C. Each worker runs
under a keeper (keeper.py), which ends it with all its descendants, even if this process is killed. A worker sees few
environment variables, and no secrets.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_rl.cores import usable_cores
from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.ranks.world import read_world
from megatron_rl.rewards import keeper
from megatron_rl.rewards.channel import Channel, ChannelError, ChannelTimeoutError
from megatron_rl.rewards.verifiers import GROUP, VERIFIERS, RewardError

if TYPE_CHECKING:  # workers import this package without pydantic
    from megatron_rl.config.schema import Config, RewardConfig

START_SECONDS = 120.0
_END_SECONDS = 30.0
_MOST_WORKERS = 16
_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_GPUS = "CUDA_VISIBLE_DEVICES"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class ResponseTask:
    prompt: Prompt
    response: str
    group: int = 0
    """Number of the group; the responses of a group follow on one another."""


@dataclass(frozen=True)
class _Call:
    """What a worker does at a time: judges responses, or checks the prompt's reference answer."""

    prompt: Prompt
    responses: tuple[str, ...] | None = None
    """None: the reference answer is checked."""

    @property
    def size(self) -> int:
        return 1 if self.responses is None else len(self.responses)

    @property
    def message(self) -> dict[str, Any]:
        return asdict(self) if self.responses is not None else {"prompt": asdict(self.prompt)}


@dataclass(frozen=True)
class Failure:
    """There is no verdict: the verifier raised, or its process took too long or ended."""

    reason: str
    silent: bool = False  # the process took too long or ended


def default_workers() -> int:
    """Number of cores that this trainer rank may use, at most 16. Raises WorldError."""
    return max(1, min(_MOST_WORKERS, usable_cores() // read_world().local_size))


class Judges:
    """Up to `workers` processes for each verifier, from the first task until `close`.

    Use it as a context manager, from one thread at a time.
    """

    def __init__(
        self,
        workers: int | None = None,
        deadline: float = 10.0,
        memory_mib: int | None = None,
        environment: Sequence[str] = (),
    ) -> None:
        """`workers` defaults to default_workers(). `deadline` is in seconds for each call of a verifier. `memory_mib`
        bounds each worker; None disables. `environment` names variables that workers see in addition to the usual
        ones."""
        self._workers = workers or default_workers()
        self._deadline = deadline
        self._memory_mib = memory_mib or 0
        self._environment = worker_environment(environment)
        self._pools: dict[str, list[_Worker]] = {}
        self.answered: Callable[[], None] = lambda: None
        """Called after each answer, by the thread that has it."""

    @classmethod
    def of(cls, config: RewardConfig) -> Judges:
        return cls(config.workers, config.timeout, config.memory_mib, config.environment)

    def asked_by(self, verifier: str) -> frozenset[str]:
        """Names of verifiers.GIVEN that are parameters of the verifier; starts one worker. Raises RewardError if the
        verifier does not exist or has other parameters, or if its process does not start."""
        worker = self._pool(verifier, 1)[0]
        worker.wait_until_ready()
        return worker.asks

    def judge(self, verifier: str, answers: Sequence[ResponseTask]) -> list[Verdict | Failure]:
        """A Verdict or a Failure for each response. Raises RewardError if a verifier or its process cannot start."""
        calls = [[answer] for answer in answers]
        if answers and verifier not in VERIFIERS and GROUP in self.asked_by(verifier):
            calls = [list(group) for _, group in groupby(answers, attrgetter("group"))]
        return self._each(verifier, [_Call(c[0].prompt, tuple(each.response for each in c)) for c in calls])

    def check(self, verifier: str, prompts: Sequence[Prompt]) -> list[Verdict | Failure]:
        """CHECKED, UNCHECKED or a Failure for each prompt's reference answer.

        Raises RewardError as `judge` does, and at once if the process of a user's verifier takes too long or ends.
        """
        return self._each(verifier, [_Call(prompt) for prompt in prompts])

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

    def _each(self, verifier: str, calls: Sequence[_Call]) -> list[Verdict | Failure]:
        pool = self._pool(verifier, min(self._workers, len(calls)))
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in pool:
            idle.put(worker)

        def ask(call: _Call) -> list[Verdict | Failure]:
            worker = idle.get()
            try:
                results = worker.ask(call, self._deadline)
            finally:
                idle.put(worker)
            self.answered()
            if call.responses is None and isinstance(failure := results[0], Failure) and failure.silent:
                _check_user(verifier, call.prompt, failure)
            return results

        with ThreadPoolExecutor(len(pool) or 1) as threads:
            # The first exception cancels the calls that have not begun.
            return [result for results in threads.map(ask, calls) for result in results]

    def _pool(self, verifier: str, workers: int) -> list[_Worker]:
        pool = self._pools.setdefault(verifier, [])
        while len(pool) < workers:
            pool.append(_Worker(verifier, self._memory_mib, self._environment))
        return pool


def _check_user(verifier: str, prompt: Prompt, failure: Failure) -> None:
    """Raises RewardError for a user's verifier, whose other checks may fail too, each after reward.timeout."""
    if verifier not in VERIFIERS:
        raise RewardError(
            f"verifier {verifier!r}: its check_answer has not answered for the reference {prompt.answer[:100]!r} of "
            f"prompt {prompt.id!r}: {failure.reason}; fix it, or raise reward.timeout or "
            "reward.memory_mib if it needs more"
        )


def check_verifier(config: Config) -> None:
    """Starts a worker of data.verifier as a test, if the verifier is the user's own and rollouts are not replayed.

    Raises RewardError, which names the key, if the worker does not start.
    """
    name = config.data.verifier
    if name is None or name in VERIFIERS or config.rollout.replay_from is not None:
        return
    try:
        with Judges.of(config.reward) as judges:
            judges.asked_by(name)
    except RewardError as error:
        raise RewardError(f"data.verifier: {error}") from None


def worker_environment(allowed: Sequence[str] = ()) -> dict[str, str]:
    """The variables that a worker sees. It is an allow-list, because keys and tokens may have any name."""
    named = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("LC_")}
    chosen = {name: os.environ[name] for name in allowed if name in os.environ}
    # The GPUs belong to the trainer and the servers.
    gpus = {} if _GPUS in allowed else {_GPUS: ""}
    # Workers find a user's verifier where this process finds it.
    path = {"PYTHONPATH": os.pathsep.join(directory or os.getcwd() for directory in sys.path)}
    return {**named, **dict.fromkeys(_THREADS, "1"), **gpus, **chosen, **path}


def start_kept(
    module: str, arguments: Sequence[str], *, descriptor: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a module, which inherits `descriptor` and nothing else, under a keeper."""
    # Without -P a queue.py in the working directory would replace Python's own module.
    worker = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.Popen(
        [sys.executable, "-ISs", str(Path(keeper.__file__)), str(descriptor), *worker],
        stdin=subprocess.PIPE,  # never written to; the keeper sees it close when this process ends
        pass_fds=[descriptor],
        env=environment,
        start_new_session=True,  # Ctrl-C must reach the trainer only
    )


def stop_kept(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:  # something has stopped the keeper; the worker dies with it
        process.kill()
        process.wait()


class _Worker:
    """One process with one verifier. It is started again after it was killed or has ended."""

    def __init__(self, verifier: str, memory_mib: int, environment: dict[str, str]) -> None:
        self._verifier = verifier
        self._memory_mib = memory_mib
        self._environment = environment
        self._numbers = count()
        self.asks: frozenset[str] = frozenset()
        """What the verifier's parameters ask for, once the worker is ready."""
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        descriptor = theirs.fileno()
        arguments = (self._verifier, str(descriptor), str(self._memory_mib))
        self._process = start_kept(
            "megatron_rl.rewards.worker", arguments, descriptor=descriptor, environment=self._environment
        )
        theirs.close()
        self._ready = False

    def stop(self) -> None:
        self._channel.close()
        stop_kept(self._process)

    def ask(self, call: _Call, seconds: float) -> list[Verdict | Failure]:
        """Returns a result for each response, within `seconds` that begin once the verifier is imported."""
        self.wait_until_ready()
        number = next(self._numbers)
        deadline = time.monotonic() + seconds
        try:
            self._channel.send({"id": number, **call.message}, seconds)
            reply = self._channel.receive(deadline - time.monotonic())
            return _results(reply, number, call.size)
        except ChannelError as error:
            told = f"took over {seconds:g} s" if isinstance(error, ChannelTimeoutError) else self._said(error)
            failure = Failure(told, silent=True)
            self.stop()
            self._start()
            return [failure] * call.size

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            reply = self._channel.receive(START_SECONDS)
        except ChannelError as error:
            reply = {"error": self._said(error)}
        if "error" in reply:
            raise RewardError(f"{reply['error']} (in the process that runs verifier {self._verifier!r})")
        self.asks = frozenset(reply.get("asks", ()))
        self._ready = True

    def _said(self, error: ChannelError) -> str:
        if isinstance(error, ChannelTimeoutError):
            return str(error)
        try:  # the keeper needs a moment to see that its child has ended
            return f"its process ended with exit status {self._process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            return str(error)


def _results(reply: dict[str, Any], number: int, size: int) -> list[Verdict | Failure]:
    """Returns a result for each of the call's `size` responses. Raises ChannelError if the reply is of another call."""
    if reply.get("id") != number:
        raise ChannelError("its connection carries something that is no reply")
    if "error" in reply:
        return [Failure(str(reply["error"]))] * size
    results = reply.get("results")
    if not isinstance(results, list) or len(results) != size:
        raise ChannelError("its connection carries something that is no reply")
    return [_result(each) for each in results]


def _result(result: Any) -> Verdict | Failure:
    if not isinstance(result, dict):
        raise ChannelError("its connection carries something that is no reply")
    if "error" in result:
        return Failure(str(result["error"]))
    reward, correct = result.get("reward"), result.get("correct")
    if not isinstance(reward, float) or not isinstance(correct, bool):
        raise ChannelError("its connection carries something that is no reply")
    return Verdict(reward, correct)
