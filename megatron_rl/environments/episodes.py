"""Conversations with environments, which the event loop never waits for.

An environment of the user's has a process for each conversation, forked from one that has imported it (env_worker.py)
under a keeper, as workers of verifiers. A step that hangs is ended after its time, and a process that crashes has ended
itself; both cost one sample. The built-in environments only compare short texts, so they run here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict
from itertools import count
from typing import Any, Protocol

import orjson

from megatron_rl.config.schema import Config, RewardConfig
from megatron_rl.data.sample import Prompt
from megatron_rl.environments.env import (
    BUILT_IN,
    Env,
    EnvError,
    EnvStep,
    Message,
    Opening,
    call_reset,
    call_step,
    get_env,
)
from megatron_rl.environments.env_worker import READY
from megatron_rl.rewards.channel import MAX_BYTES
from megatron_rl.rewards.judges import START_SECONDS, start_kept, stop_kept, worker_environment


class EpisodeFailure(Exception):
    """A conversation that cannot go on: the environment raised, its process took too long or ended."""


class Episode(Protocol):
    """One conversation with an environment."""

    async def reset(self, prompt: Prompt) -> Opening:
        """Raises EpisodeFailure."""
        ...

    async def step(self, message: Message) -> EnvStep:
        """Raises EpisodeFailure, after which no step may follow."""
        ...


class Environments:
    """Use it as a context manager, or call `close`. Episodes must be opened from one thread."""

    def __init__(self, name: str, reward: RewardConfig) -> None:
        """Starts the process of an environment of the user's. `reward` has the limits, which are those of verifiers.
        Raises EnvError if a built-in environment of that name does not exist."""
        self.name = name
        self._seconds = reward.timeout
        self._origin = None if name in BUILT_IN else _Origin(name, reward)
        self._numbers = count()
        if ":" not in name:
            get_env(name)

    def wait_until_ready(self) -> None:
        """Raises EnvError if the environment cannot be imported."""
        if self._origin is not None:
            self._origin.wait_until_ready()

    @contextlib.asynccontextmanager
    async def episode(self) -> AsyncIterator[Episode]:
        if self._origin is None:
            yield _Here(get_env(self.name)())
            return
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            self._origin.open(number, theirs)
        try:
            yield _Forked(reader, writer, self._seconds)
        finally:
            writer.close()
            self._origin.end(number)

    def close(self) -> None:
        if self._origin is not None:
            self._origin.close()

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_environment(config: Config) -> None:
    """Starts the environment as a test, unless rollouts are replayed. Raises EnvError, which names the key, if it does
    not start."""
    environment = config.rollout.environment
    if environment is None or config.rollout.replay_from is not None:
        return
    try:
        with Environments(environment.name, config.reward) as environments:
            environments.wait_until_ready()
    except EnvError as error:
        raise EnvError(f"rollout.environment.name: {error}") from None


class _Here:
    def __init__(self, env: Env) -> None:
        self._env = env

    async def reset(self, prompt: Prompt) -> Opening:
        try:
            return call_reset(self._env, prompt)
        except Exception as error:
            raise EpisodeFailure(f"{type(error).__name__}: {error}") from None

    async def step(self, message: Message) -> EnvStep:
        try:
            return call_step(self._env, message)
        except Exception as error:
            raise EpisodeFailure(f"{type(error).__name__}: {error}") from None


class _Forked:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self._reader = reader
        self._writer = writer
        self._seconds = seconds

    async def reset(self, prompt: Prompt) -> Opening:
        return Opening(**await self._ask({"prompt": asdict(prompt)}))

    async def step(self, message: Message) -> EnvStep:
        return EnvStep(**await self._ask({"message": message}))

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        data = orjson.dumps(message)
        try:
            async with asyncio.timeout(self._seconds):
                self._writer.write(len(data).to_bytes(8, "little") + data)
                await self._writer.drain()
                length = int.from_bytes(await self._reader.readexactly(8), "little")
                if length > MAX_BYTES:
                    raise EpisodeFailure(f"it returned more than {MAX_BYTES >> 20} MiB")
                reply = orjson.loads(await self._reader.readexactly(length))
        except TimeoutError:
            raise EpisodeFailure(f"took over {self._seconds:g} s (reward.timeout)") from None
        except (OSError, asyncio.IncompleteReadError):
            raise EpisodeFailure("its process ended") from None
        if "error" in reply:
            raise EpisodeFailure(reply["error"])
        found: dict[str, Any] = reply["reply"]
        return found


class _Origin:
    """The process that forks."""

    def __init__(self, name: str, reward: RewardConfig) -> None:
        self._name = name
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = (name, str(theirs.fileno()), str(reward.memory_mib or 0))
        environment = worker_environment(reward.environment)
        self._process = start_kept(
            "megatron_rl.environments.env_worker", arguments, descriptor=theirs.fileno(), environment=environment
        )
        theirs.close()
        self._ready = False

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        self._control.settimeout(START_SECONDS)
        try:
            message = self._control.recv(4096)
        except TimeoutError:
            raise EnvError(f"environment {self._name!r}: not imported after {START_SECONDS:g} s") from None
        if message != READY:
            said = message.decode() or f"environment {self._name!r}: its process ended"
            raise EnvError(f"{said} (in the process that imports it)")
        self._ready = True

    def open(self, number: int, end: socket.socket) -> None:
        """Raises EnvError if the process has ended."""
        try:
            socket.send_fds(self._control, [f"open {number}".encode()], [end.fileno()])
        except OSError:
            raise EnvError(f"environment {self._name!r}: the process that imported it has ended") from None

    def end(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._control.send(f"end {number}".encode())

    def close(self) -> None:
        self._control.close()
        stop_kept(self._process)
