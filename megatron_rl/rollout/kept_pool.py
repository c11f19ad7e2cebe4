"""Keeps launched servers from one run of a process to the next, if the next needs servers that are started alike."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.models.identity import file_digests
from megatron_rl.rollout.pool import Pool, PoolOptions
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
    def open(self, options: PoolOptions) -> Iterator[Pool]:
        """The kept pool if it fits and its servers live, or a new one in its place. Stands in for Pool."""
        if options.rollout.servers.are_elsewhere:
            with Pool(options) as pool:
                yield pool
            return
        wanted = (
            options.rollout.servers,
            options.rollout.concurrency,
            options.engine.device,
            options.engine.dtype,
            options.model.resolve(),
            tuple(file_digests(options.model).items()),
            options.return_routed_experts,
        )
        if self._pool is None or wanted != self._started_as or not _lives(self._pool):
            self.close()
            pool = Pool(dataclasses.replace(options, logs=self._logs))
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
