"""Gives the policy's weights to the rollout servers, and knows which weight versions they may answer with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_rl.config.schema import Config
from megatron_rl.data.versions import Versions
from megatron_rl.lab.console import Console
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.gpu_turns import SAMPLING, SYNC, GpuTurns
from megatron_rl.loop.members import Members
from megatron_rl.loop.trainer import Trainer
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.sync import WeightSync


@dataclass(frozen=True)
class Publisher:
    """Publishes weights. Every rank has one, with its own parts; without `sync`, it does nothing, as rollouts are
    replayed."""

    versions: Versions
    """Weight versions that a server may answer with."""
    sync: WeightSync | None
    members: Members | None
    gpu_turns: GpuTurns
    """Servers have their turn after each sync."""
    leader: Leader | None
    tells: bool
    """Whether the leader pauses servers, for all leaders."""
    phase: Callable[[str], AbstractContextManager[None]]
    """Times a phase of a step."""

    @classmethod
    def of(cls, config: Config, trainer: Trainer, servers: Servers | None, gpu_turns: GpuTurns) -> Publisher:
        leader = None if servers is None else servers.leader
        tells = trainer.place.rank == 0
        sync = None
        if servers is not None:
            sync = WeightSync(
                config.weights,
                trainer.policy,
                leader if tells else None,
                trainer.run.path / "weights",
                temperature=config.rollout.temperature,
                seed=config.seed,
                sampling=gpu_turns.sampling,
            )
        members = None if servers is None else Members(trainer.place.control, servers)
        return cls(Versions(0, config.rollout.lag), sync, members, gpu_turns, leader, tells, trainer.journal.phase)

    def start(self, version: int, console: Console) -> None:
        """Publishes the weights that the run begins or goes on with, and says so. Collective. Raises as `publish`."""
        if self.sync is None:
            return
        with console.starting("weights", f"version {version} to all servers"):
            self._resume()  # a trainer that was killed in a sync has left them paused
            if self.leader is not None and self.tells:
                self.leader.abandon_requests()  # servers empty no cache, and so take no weights, before these end
            self.publish(version)

    def publish(self, version: int) -> dict[str, float]:
        """Gives all servers the policy as weight version `version`; returns what is to be logged. Collective.

        Raises WeightSyncError, RolloutError or ServerError if no server is left, and if the first sync fails.
        """
        if self.sync is None or self.members is None:
            return {}
        self.gpu_turns.take(SYNC)
        with self.phase("weight sync"):
            self.members.choose(self.sync)
            with self._paused(self.sync):
                report = self.sync.push(version)
                self.members.admit(self.sync, newcomers=False)
                self.versions.newest = version
            report |= self.sync.verify_if_due(version)
            self.members.admit(self.sync, newcomers=True)
        self.gpu_turns.take(SAMPLING)
        return report

    @contextlib.contextmanager
    def _paused(self, sync: WeightSync) -> Iterator[None]:
        """Has the servers put aside the requests in flight, which then go on with the new weights. On shared GPUs they
        have done so at the end of their turn. Collective."""
        if self.versions.lag == 0 or self.gpu_turns.shares:
            yield
            return
        if self.leader is not None:
            self.leader.pause(tell=self.tells)
            sync.leave_out({url: why for url, why in self.leader.ejected.items() if url not in sync.newcomers})
        try:
            yield
        finally:  # whatever has failed, servers that run elsewhere are of use to the next run
            self._resume()

    def _resume(self) -> None:
        if self.leader is not None:
            self.leader.resume(tell=self.tells)

    def close(self) -> None:
        if self.sync is not None:
            self.sync.close()
