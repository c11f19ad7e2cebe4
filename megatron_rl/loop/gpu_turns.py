"""Takes turns on the GPUs that the trainer's ranks and the rollout servers share (rollout.servers.colocate).

| turn | servers hold | the trainer holds |
|---|---|---|
| SAMPLING | weights, KV cache | nothing |
| TRAINING | nothing | weights of all networks, gradients, optimizers |
| SYNC | weights, which the trainer is about to set | the policy's weights |

A turn that ends gives back what the next one does not hold, on all ranks, before the next takes anything. Servers lose
the values of what they give back, so TRAINING is followed by SYNC. Checkpoints may be taken in every turn
(engine/offload.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron_rl.engine.network import Network
from megatron_rl.engine.offload import Kind, offload, restore
from megatron_rl.errors import UserError
from megatron_rl.lab.journal import Journal
from megatron_rl.loop.networks import Networks
from megatron_rl.ranks.collectives import together
from megatron_rl.ranks.place import Place
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.client import MemoryTag
from megatron_rl.rollout.source import Leader

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """What each side holds on the GPUs, in the order in which it is taken."""

    servers: tuple[MemoryTag, ...]
    trainer: tuple[str, ...]


SAMPLING = Turn(servers=("weights", "kv_cache"), trainer=())
TRAINING = Turn(servers=(), trainer=("policy", "others", "gradients", "optimizers"))
SYNC = Turn(servers=("weights",), trainer=("policy",))


class GpuTurns:
    """Every rank has one, and calls it with the others. Without `shares` nothing is ever moved."""

    def __init__(self, networks: Networks, place: Place, journal: Journal, *, shares: bool) -> None:
        """It is the trainer's turn, because there are no servers yet."""
        self.servers: Leader | None = None
        """This leader's connections to the servers, once these are there; rank 0 tells the servers."""
        self._networks = networks
        self._place = place
        self._journal = journal
        self.shares = shares
        self._now = TRAINING

    def take(self, turn: Turn) -> None:
        """Ends the turn that there is and begins another. Raises UserError, on every rank, if a server fails.
        Collective."""
        if not self.shares or turn == self._now:
            return
        with self._journal.phase("turns"):
            before, self._now = self._now, turn
            self._move(before, turn)

    def _move(self, before: Turn, turn: Turn) -> None:
        with self._asking("release"):
            if self.servers is not None and (tags := _beyond(before.servers, turn.servers)):
                self.servers.release_memory(tags, tell=self._place.rank == 0)
        for kind in reversed(_beyond(before.trainer, turn.trainer)):
            for network, its in self._held[kind]:
                offload(network, its)
        dist.barrier(group=self._place.control)  # a server has the GPUs of several ranks
        with self._asking("take back"):
            if self.servers is not None and (tags := _beyond(turn.servers, before.servers)):
                self.servers.resume_memory(tags, answers=turn == SAMPLING, tell=self._place.rank == 0)
        for kind in _beyond(turn.trainer, before.trainer):
            for network, its in self._held[kind]:
                restore(network, its)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Lets the servers answer in the middle of another turn. Collective."""
        before = self._now
        self.take(SAMPLING)
        yield
        self.take(before)

    @property
    def _held(self) -> dict[str, list[tuple[Network, Kind]]]:
        networks = self._networks
        trained = networks.trained.values()
        others = filter(None, (networks.critic, networks.reference))
        return {
            "policy": [(networks.policy, "weights")],
            "others": [(network, "weights") for network in others],
            "gradients": [(network, "gradients") for network in trained],
            "optimizers": [(network, "optimizer") for network in trained],
        }

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        with together(self._place.control):
            try:
                yield
            except UserError as error:
                raise RolloutError(
                    f"rollout.servers.colocate: a server did not {what} its memory (if a GPU is full, lower "
                    f"--mem-fraction-static in rollout.servers.extra_flags): {error}"
                ) from error


def _beyond(these: Sequence[T], those: Sequence[T]) -> list[T]:
    return [each for each in these if each not in those]
