"""Keeps launched servers from one run of a process to the next, if the next needs servers that are started alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.schema import EngineConfig, RolloutConfig
from megatron_rl.models.identity import file_digests
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.server import ServerError


class KeptPool:
    """Holds the servers of the last run until `close`.

    Every run pushes its own weights before it samples, so only what a server is started with must be equal: the model's
    files, dtype, flags, number, device, and whether it returns routes. The seed need not be: a kept server goes on
    with the random numbers of the seed that it was started with.
    """

    def __init__(self, logs: Path) -> None:
        """Servers write their logs into `logs`."""
        self._logs = logs
        self._pool: Pool | None = None
        self._started_as: tuple[object, ...] = ()

    @contextlib.contextmanager
    def open(
        self,
        rollout: RolloutConfig,
        engine: EngineConfig,
        model: Path,
        logs: Path,
        seed: int,
        *,
        return_routed_experts: bool = False,
        api_key: str | None = None,
    ) -> Iterator[Pool]:
        """The kept pool if it fits and its servers live, or a new one in its place. Stands in for Pool."""
        if rollout.servers.urls:
            with Pool(rollout, engine, model, logs, seed, api_key=api_key) as pool:
                yield pool
            return
        wanted = (
            rollout.servers,
            rollout.concurrency,
            engine.device,
            engine.dtype,
            model.resolve(),
            tuple(file_digests(model).items()),
            return_routed_experts,
        )
        if self._pool is None or wanted != self._started_as or not _lives(self._pool):
            self.close()
            pool = Pool(rollout, engine, model, self._logs, seed, return_routed_experts=return_routed_experts)
            self._pool, self._started_as = pool.__enter__(), wanted
        yield self._pool

    def close(self) -> None:
        """Ends the servers."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None


def _lives(pool: Pool) -> bool:
    try:
        pool.check_alive()
    except ServerError:
        return False
    return True
