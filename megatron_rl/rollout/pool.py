"""The rollout servers of a run: those given by URL, or servers of our own, started and watched here."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rl.config.schema import EngineConfig, RolloutConfig
from megatron_rl.cores import threads_per_process
from megatron_rl.rollout.server import Server, ServerOptions, free_ports


class Pool:
    """Lives on the trainer's rank 0. Entering starts what has to be started and waits until all answer."""

    def __init__(self, rollout: RolloutConfig, engine: EngineConfig, model: Path, logs: Path, seed: int) -> None:
        self._rollout = rollout
        self._engine = engine
        self._model = model
        self._logs = logs
        self._seed = seed
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
                options = ServerOptions(
                    model=self._model,
                    port=port,
                    device=self._engine.device,
                    dtype=self._engine.dtype if config.dtype == "auto" else config.dtype,
                    tp=config.tp,
                    max_total_tokens=config.max_total_tokens,
                    max_running_requests=self._rollout.concurrency,
                    threads=threads_per_process(config.launch),
                    seed=self._seed + number,
                    extra_flags=config.extra_flags,
                )
                self._servers.append(Server(options, self._logs / f"server-{number}.log"))
            for server in self._servers:
                server.wait_ready(config.start_timeout)
        except BaseException:
            self.close()
            raise
        return self

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
