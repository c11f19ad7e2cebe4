"""The rollout servers of a run: servers given by URL, or servers that the trainer starts and watches."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rl.config.schema import Config, EngineConfig, RolloutConfig
from megatron_rl.config.servers import read_urls
from megatron_rl.cores import threads_per_process
from megatron_rl.ranks.world import read_world
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.client import SGLangClient, UnreachableError
from megatron_rl.rollout.server import Server, ServerError, ServerOptions, free_ports
from megatron_rl.rollout.server_needs import (
    CannotTell,
    CheckFailed,
    Needs,
    check_lengths,
    check_parallelism,
    check_same_model,
    explain_refusal,
)

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10.0  # for one request to a server that may not run yet
WAIT_SECONDS = 1.0
MAX_RESTARTS = 3


@dataclass(frozen=True)
class PoolOptions:
    """The servers that a run asks for."""

    rollout: RolloutConfig
    engine: EngineConfig
    model: Path
    logs: Path
    """Directory of the logs of servers that are started."""
    seed: int
    return_routed_experts: bool = False
    needs: Needs = field(default_factory=Needs)
    """What servers given by URL must be able to do."""
    api_key: str | None = field(default=None, repr=False)
    """Key of servers given by URL; servers that are started get a random key."""


class Pool:
    """Servers of the run, held by rank 0. Entering the context starts the launched ones and waits until all answer."""

    def __init__(self, options: PoolOptions) -> None:
        self._asked = options
        self.api_key = options.api_key if options.rollout.servers.are_elsewhere else secrets.token_urlsafe(32)
        self._servers: list[Server] = []
        self._listed: Sequence[str] = options.rollout.servers.urls
        self._restarts = Counter[str]()

    @property
    def urls(self) -> list[str]:
        return list(self._listed) or [server.url for server in self._servers]

    def read_file(self) -> None:
        """Reads rollout.servers.urls_file, if there is one. Raises ConfigError."""
        if (file := self._asked.rollout.servers.urls_file) is not None:
            self._listed = read_urls(file, have_key=self.api_key is not None)

    def __enter__(self) -> Self:
        config = self._asked.rollout.servers
        self.read_file()
        if config.are_elsewhere:
            asyncio.run(wait_for_servers(self.urls, self.api_key, config.start_timeout, self._asked.needs, _say))
            return self
        try:
            for number, port in enumerate(free_ports(config.launch)):
                self._servers.append(Server(self._options(number, port), self._asked.logs / f"server-{number}.log"))
            for server in self._servers:
                server.wait_ready(config.start_timeout)
        except BaseException:
            self.close()
            raise
        return self

    def _options(self, number: int, port: int) -> ServerOptions:
        config = self._asked.rollout.servers
        return ServerOptions(
            model=self._asked.model,
            host=own_host(),
            port=port,
            device=self._asked.engine.device,
            dtype=self._asked.engine.dtype if config.dtype == "auto" else config.dtype,
            tp=config.tp,
            first_gpu=number * config.tp + (0 if config.colocate else local_ranks()),
            memory_saver=config.colocate,
            max_total_tokens=config.max_total_tokens,
            max_running_requests=self._asked.rollout.concurrency,
            threads=config.threads or threads_per_process(config.launch),
            seed=self._asked.seed + number,
            return_routed_experts=self._asked.return_routed_experts,
            extra_flags=config.extra_flags,
            api_key=self.api_key,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, url: str) -> None:
        """Raises ServerError, with the end of its log, if the trainer started this server and it has died."""
        for server in self._servers:
            if server.url == url:
                server.check_alive()

    def check_alive(self) -> None:
        """Raises as `check` does, for every server."""
        for server in self._servers:
            server.check_alive()

    def restart(self, silent: Sequence[str]) -> None:
        """Starts the trainer's own servers again that are silent, at most MAX_RESTARTS times each, except those that
        are still starting. Does not wait until they answer."""
        for place, server in enumerate(self._servers):
            if server.url not in silent:
                server.has_answered = True
                continue
            starts = server.is_alive() and not server.has_answered
            if starts and server.age < self._asked.rollout.servers.start_timeout:
                continue
            if self._restarts[server.url] == MAX_RESTARTS:
                continue
            logger.warning("%s: started again", server.url)
            self._restarts[server.url] += 1
            server.stop()
            self._servers[place] = Server(server.options, server.log)

    def wait_restarted(self) -> list[str]:
        """Waits until the trainer's own servers that live answer; returns their URLs. Raises ServerError."""
        timeout = self._asked.rollout.servers.start_timeout
        living = [server for server in self._servers if server.is_alive()]
        for server in living:
            server.wait_ready(timeout)
        return [server.url for server in living]

    def close(self) -> None:
        for server in self._servers:
            server.stop()
        self._servers.clear()


PoolOpener = Callable[[PoolOptions], AbstractContextManager[Pool]]
"""Gives a run its pool: Pool, which starts the run's own servers, or KeptPool.open, which may have them already."""


def read_api_key(name: str, option: str) -> str:
    """The key in the environment variable `name`, which `option` gave. Raises ServerError, which hides the key."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ServerError(f"{option}: the environment variable {name} is not set; set it to the servers' key")
    odd = [place for place, character in enumerate(key, start=1) if not "!" <= character <= "~"]
    if odd:
        raise ServerError(
            f"{option}: character {odd[0]} of the key in the environment variable {name} is a space, a control "
            "character or not ASCII, which no HTTP header carries; set it to the servers' key alone"
        )
    return key


def read_server_key(config: Config) -> str | None:
    """The key of servers given by URL; None if they need none. Raises ServerError, which never shows it."""
    name = config.rollout.servers.api_key_env
    return read_api_key(name, "rollout.servers.api_key_env") if name else None


async def wait_for_servers(
    urls: Sequence[str], api_key: str | None, timeout_seconds: float, needs: Needs, say: Callable[[str], None]
) -> None:
    """Waits until all servers answer, and checks what they say of themselves.

    Raises ServerError if a server does not answer in time, and RolloutError or CheckFailed at once if it wants another
    key, serves another model or cannot answer the run's longest request.
    """
    await asyncio.gather(*(_wait_for(url, api_key, timeout_seconds, needs, say) for url in urls))


async def _wait_for(
    url: str, api_key: str | None, timeout_seconds: float, needs: Needs, say: Callable[[str], None]
) -> None:
    deadline = time.monotonic() + timeout_seconds
    said = False
    async with SGLangClient(url, api_key=api_key, deadline=PROBE_SECONDS, max_tries=1) as client:
        while True:
            client.deadline = min(PROBE_SECONDS, max(WAIT_SECONDS, round(deadline - time.monotonic(), 1)))
            try:
                await check_described(client, needs)
                return
            except UnreachableError as error:
                why = str(error)
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"{why}; rollout.servers.start_timeout, {timeout_seconds:g} s, has passed: is the server started, "
                    "and is its URL right?"
                )
            if not said:
                say(f"waiting up to {timeout_seconds:g} s for the rollout server at {url}")
                said = True
            await asyncio.sleep(min(WAIT_SECONDS, max(0.0, deadline - time.monotonic())))


async def check_described(client: SGLangClient, needs: Needs) -> str:
    """Compares what a server says of its model and its settings with `needs`; returns what was found.

    Raises UnreachableError if it does not answer, RolloutError if it is no SGLang or wants another key, and
    CheckFailed, which names the server.
    """
    try:
        model, info = await client.model_info(), await client.server_info()
    except UnreachableError:
        raise
    except RolloutError as error:
        raise RolloutError(f"{error}; {explain_refusal(error)}") from None
    found = [f"SGLang {info.get('version')} on {info.get('device')}"]
    checks: list[Callable[[], str]] = [
        lambda: check_same_model(model, needs),
        lambda: check_parallelism(info),
        lambda: check_lengths(info, needs),
    ]
    for check in checks:
        try:
            found.append(check())
        except CheckFailed as error:
            raise CheckFailed(f"{client.url}: {error}") from None
        except CannotTell as unknown:
            found.append(str(unknown))
    return "; ".join(found)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def local_ranks() -> int:
    """Number of trainer ranks on this machine. They use the first GPUs; launched servers use the next ones."""
    return read_world().local_size


def own_host() -> str:
    """Address at which all leaders reach rank 0's servers: torchrun's master if some leaders are on other machines."""
    on_one_machine = read_world().size == local_ranks()
    return "127.0.0.1" if on_one_machine else os.environ["MASTER_ADDR"]
