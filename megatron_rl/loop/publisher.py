"""Gives the policy's weights to the rollout servers, and knows which weight versions they may answer with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_rl.config.schema import Config
from megatron_rl.data.versions import Versions
from megatron_rl.errors import UserError
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import together
from megatron_rl.weights.sync import WeightSync


class Publisher:
    def __init__(self, config: Config, trainer: Trainer, servers: Servers | None) -> None:
        """Without `servers`, when rollouts are replayed, nothing is published."""
        self.versions = Versions(0, config.rollout.lag)
        """Weight versions that a server may answer with."""
        self._rollouts_go_on = config.rollout.lag > 0
        self._leader = None if servers is None else servers.leader
        self._tells = trainer.place.rank == 0  # the servers, for all leaders
        self._trainer = trainer
        self._servers = servers
        self._sync: WeightSync | None = None
        if servers is not None:
            first = self._leader if self._tells else None
            self._sync = WeightSync(
                config.weights,
                trainer.policy,
                first,
                trainer.run.path / "weights",
                temperature=config.rollout.temperature,
                seed=config.seed,
            )

    def start(self, version: int) -> None:
        """Publishes the weights that the run begins or goes on with, and says so. Collective."""
        if self._servers is not None:
            with self._trainer.console.starting("weights", f"version {version} to all servers"):
                with together(self._trainer.place.control):
                    self._resume()  # a trainer that was killed in a sync has left them paused
                self.publish(version)

    def publish(self, version: int) -> dict[str, float]:
        """Gives all servers the policy as weight version `version`; returns what is to be logged. Collective."""
        if self._servers is None or self._sync is None:
            return {}
        with self._trainer.journal.phase("weight sync"):
            self._servers.check()
            with self._paused():
                report = self._sync.push(version)
                self.versions.newest = version
            return report | self._sync.verify_if_due(version)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Has the servers put aside the requests in flight, which then go on with the new weights. Collective."""
        if not self._rollouts_go_on:
            yield
            return
        with together(self._trainer.place.control):
            if self._leader is not None:
                self._leader.pause(tell=self._tells)
        try:
            yield
        except UserError:
            with contextlib.suppress(UserError):  # servers that run elsewhere are of use to the next run
                self._resume()
            raise
        with together(self._trainer.place.control):
            self._resume()

    def _resume(self) -> None:
        if self._leader is not None:
            self._leader.resume(tell=self._tells)

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
