"""The rollout servers of a run: those given by URL, or servers of our own, started and watched here."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rl.config.schema import EngineConfig, RolloutConfig, ServersConfig
from megatron_rl.cores import threads_per_process
from megatron_rl.rollout.server import Server, ServerError, ServerOptions, free_ports
from megatron_rl.world import read_world


class Pool:
    """Lives on the trainer's rank 0. Entering starts what has to be started and waits until all answer."""

    def __init__(
        self,
        rollout: RolloutConfig,
        engine: EngineConfig,
        model: Path,
        logs: Path,
        seed: int,
        *,
        return_routed_experts: bool = False,
    ) -> None:
        self._rollout = rollout
        self._engine = engine
        self._model = model
        self._logs = logs
        self._seed = seed
        self._return_routed_experts = return_routed_experts
        self._servers: list[Server] = []

    @property
    def urls(self) -> list[str]:
        return list(self._rollout.servers.urls) or [server.url for server in self._servers]

    def __enter__(self) -> Self:
        config = self._rollout.servers
        if config.urls:
            return self
        try:
            for number, port in enumerate(free_ports(config.launch)):
                self._servers.append(Server(self._options(number, port), self._logs / f"server-{number}.log"))
            for server in self._servers:
                server.wait_ready(config.start_timeout)
        except BaseException:
            self.close()
            raise
        return self

    def _options(self, number: int, port: int) -> ServerOptions:
        config = self._rollout.servers
        return ServerOptions(
            model=self._model,
            host=own_host(),
            port=port,
            device=self._engine.device,
            dtype=self._engine.dtype if config.dtype == "auto" else config.dtype,
            tp=config.tp,
            first_gpu=local_ranks() + number * config.tp,
            max_total_tokens=config.max_total_tokens,
            max_running_requests=self._rollout.concurrency,
            threads=threads_per_process(config.launch),
            seed=self._seed + number,
            return_routed_experts=self._return_routed_experts,
            extra_flags=config.extra_flags,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_alive(self) -> None:
        """Raises ServerError, with the end of its log, when a server of ours has died."""
        for server in self._servers:
            server.check_alive()

    def close(self) -> None:
        for server in self._servers:
            server.stop()
        self._servers.clear()


def read_api_key(servers: ServersConfig) -> str | None:
    """The key of servers that run elsewhere, None for none. Raises ServerError when its variable is not set."""
    name = servers.api_key_env
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ServerError(
            f"rollout.servers.api_key_env: the environment variable {name} is not set; set it to the key of "
            "rollout.servers.urls on the machine of every rank"
        )
    return key


def local_ranks() -> int:
    """Ranks of the trainer on this machine: they have the first GPUs, servers of ours those after."""
    return read_world().local_size


def own_host() -> str:
    """Where all leaders reach the servers of rank 0's machine: torchrun's master, if some are on other machines."""
    on_one_machine = read_world().size == local_ranks()
    return "127.0.0.1" if on_one_machine else os.environ["MASTER_ADDR"]
