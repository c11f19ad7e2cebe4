"""Asks all rollout servers at once during a weight sync."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import silent_servers

T = TypeVar("T")
Bucket = list[tuple[str, Tensor]]


class WeightSyncError(UserError):
    """A server refused weights, or did not answer in time."""

    def __init__(self, text: str, urls: Sequence[str] = ()) -> None:
        """`urls`: the servers at fault, if it is known which these are."""
        super().__init__(text)
        self.urls = urls


@dataclass(frozen=True)
class Sent:
    """What a weight sync moved, and where its time went."""

    bytes: int
    """Bytes that each server got or read."""
    seconds: dict[str, float]
    """Rank 0's seconds by phase; phases may overlap."""


class AllServers:
    def __init__(self, clients: Sequence[SGLangClient], loop: BackgroundLoop, timeout_seconds: float) -> None:
        self.clients = clients
        self.urls = [client.url for client in clients]
        self.timeout = timeout_seconds
        self._loop = loop

    def that_answer(self) -> Self:
        """Returns those that answer at all, within seconds, which a host that is gone does not."""
        silent = self._loop.run(silent_servers(self.clients))
        return type(self)([client for client in self.clients if client.url not in silent], self._loop, self.timeout)

    def start(self, call: str, **arguments: Any) -> list[Future[Any]]:
        """Calls a method of all clients and returns at once."""
        return [self._loop.start(getattr(client, call)(**arguments)) for client in self.clients]

    def start_each(self, call: str, arguments: Sequence[dict[str, Any]]) -> list[Future[Any]]:
        """Calls a method of all clients, with arguments for each, and returns at once."""
        pairs = zip(self.clients, arguments, strict=True)
        return [self._loop.start(getattr(client, call)(**own)) for client, own in pairs]

    def ask(self, call: str, **arguments: Any) -> list[Any]:
        """Calls a method of all clients and returns their answers. Raises WeightSyncError."""
        return self.wait(self.start(call, **arguments))

    def wait(self, answers: Sequence[Future[T]]) -> list[T]:
        return wait_for(answers, self.timeout, self.urls)


def wait_for(answers: Sequence[Future[T]], timeout_seconds: float, who: Sequence[str]) -> list[T]:
    """Waits for all answers; `who` names the servers in the same order.

    Raises WeightSyncError as soon as a server refuses, and if a server does not answer in time.
    """
    done, waiting = concurrent.futures.wait(answers, timeout_seconds, concurrent.futures.FIRST_EXCEPTION)
    for name, answer in zip(who, answers, strict=False):
        if answer not in done:
            continue
        if isinstance(error := answer.exception(), UserError):
            raise WeightSyncError(f"weight sync: {error}", [name]) from error
        if error is not None:
            raise error
    if waiting:
        names = ", ".join(name for name, answer in zip(who, answers, strict=False) if answer in waiting)
        raise WeightSyncError(f"weight sync: no answer within weights.timeout, {timeout_seconds:g} s, from {names}")
    return [answer.result() for answer in answers]
