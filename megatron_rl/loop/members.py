"""Which servers get the next weight version: those that live, and those that come to them or come back.

Ranks agree at each weight sync. A leader ejects a server for itself, as soon as it fails; here its word counts for all.
A server comes back, or to the others, at a weight sync only: it gets all weights, which are verified before any leader
samples from it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import orjson
import torch.distributed as dist

from megatron_rl.config.sources import ConfigError
from megatron_rl.loop.connections import Servers
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.rollout.fleet import silent_servers
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.sync import WeightSync

logger = logging.getLogger(__name__)


class Members:
    """Every rank has one."""

    def __init__(self, control: dist.ProcessGroup, servers: Servers) -> None:
        """`control`: gloo, all ranks."""
        self._control = control
        self._servers = servers

    def choose(self, sync: WeightSync) -> None:
        """Tells `sync` on rank 0 which servers get the next weights. Collective.

        Raises RolloutError or ServerError if there are none.
        """
        leader, pool = self._servers.leader, self._servers.pool
        mine = {} if leader is None else leader.ejected
        told = [orjson.loads(each) for each in all_gather_bytes(orjson.dumps(mine), self._control)]
        with together(self._control):
            if leader is not None and pool is not None:
                ejected: dict[str, str] = {url: why for each in told for url, why in each.items()}
                live, back = _choose(leader, pool, ejected)
                sync.use([leader.client(url) for url in (*live, *back)], newcomers=back)

    def admit(self, sync: WeightSync, *, newcomers: bool) -> None:
        """Has all leaders sample from the servers that got the newest weights; with `newcomers`, which were verified,
        or without. Collective."""
        mine = None
        if self._servers.pool is not None:
            urls = [url for url in sync.urls if newcomers or url not in sync.newcomers]
            mine = orjson.dumps([urls, sync.lost])
        urls, lost = orjson.loads(broadcast_bytes(mine, self._control))
        if self._servers.leader is not None:
            self._servers.leader.admit(urls, lost)


def _choose(leader: Leader, pool: Pool, ejected: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Returns the servers that live, and those that come to them. Raises RolloutError or ServerError if there are
    none."""
    try:
        pool.read_file()
    except ConfigError as error:
        logger.warning("%s; the servers stay the same", error)
    live = [url for url in leader.urls if url in pool.urls and url not in ejected]
    others = [url for url in pool.urls if url not in live]
    silent = leader.loop.run(silent_servers([leader.client(url) for url in others]))
    pool.restart(silent)
    back = [url for url in others if url not in silent]
    if not live and not back:
        back = pool.wait_restarted() or [client.url for client in leader.clients]  # which raises
    if back:
        logger.info("%s: gets the weights, and is used again once they are verified", ", ".join(back))
    return live, back
