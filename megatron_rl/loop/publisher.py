"""Gives the policy's weights to the rollout servers, and knows which weight versions they may answer with."""

from __future__ import annotations

from megatron_rl.config.schema import Config
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.trainer import Trainer
from megatron_rl.weights.sync import WeightSync


class Publisher:
    def __init__(self, config: Config, trainer: Trainer, servers: Servers | None) -> None:
        """Without `servers`, when rollouts are replayed, nothing is published."""
        self.versions: frozenset[int] = frozenset()
        """Weight versions that a server may hold."""
        self._trainer = trainer
        self._servers = servers
        self._sync: WeightSync | None = None
        if servers is not None:
            first = servers.leader if trainer.place.rank == 0 else None
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
                self.publish(version)

    def publish(self, version: int) -> dict[str, float]:
        """Gives all servers the policy as weight version `version`; returns what is to be logged. Collective."""
        if self._servers is None or self._sync is None:
            return {}
        with self._trainer.journal.phase("weight sync"):
            self._servers.check()
            report = self._sync.push(version)
        self.versions = frozenset({version})
        return report

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
