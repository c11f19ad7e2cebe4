"""This rank's connections to the rollout servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import orjson

from megatron_rl.config.schema import Config
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import broadcast_bytes, together
from megatron_rl.rollout.pool import Pool, PoolOpener, PoolOptions, read_server_key
from megatron_rl.rollout.server_needs import Needs
from megatron_rl.rollout.source import Leader, first_server
from megatron_rl.rollout.transport import IDLE_SECONDS, LAUNCHED_IDLE_SECONDS


@dataclass(frozen=True)
class Servers:
    """`pool` is rank 0's, `leader` each data-parallel leader's; None on other ranks."""

    pool: Pool | None
    leader: Leader | None


@contextlib.contextmanager
def connect(config: Config, trainer: Trainer, open_pool: PoolOpener = Pool) -> Iterator[Servers]:
    """Opens the pool of servers on rank 0, which tells the leaders where they are. Collective."""
    place, rollout = trainer.place, config.rollout
    api_key = read_server_key(config)
    with ExitStack() as stack:
        pool = None
        with together(place.control):
            if place.rank == 0:
                pool = stack.enter_context(open_pool(_options(config, trainer, api_key)))
        told = orjson.dumps([pool.urls, None if rollout.servers.are_elsewhere else pool.api_key]) if pool else None
        urls, random_key = orjson.loads(broadcast_bytes(told, place.control))
        leader = None
        if place.leads_replica:
            leader = Leader(
                urls,
                api_key=random_key or api_key,
                deadline=rollout.deadline,
                concurrency=rollout.concurrency,
                first=first_server(place.dp, trainer.layout.dp, len(urls)),
                idle_seconds=IDLE_SECONDS if rollout.servers.are_elsewhere else LAUNCHED_IDLE_SECONDS,
                check=pool.check if pool else lambda url: None,
                activity=trainer.journal.activity,
            )
            stack.callback(leader.close)
        yield Servers(pool, leader)


def _options(config: Config, trainer: Trainer, api_key: str | None) -> PoolOptions:
    return PoolOptions(
        rollout=config.rollout,
        engine=config.engine,
        model=config.model.path,
        logs=trainer.run.logs,
        seed=config.seed,
        return_routed_experts=config.routing.needs_rollout_routes,
        needs=Needs.of(config, None),
        api_key=api_key,
    )
