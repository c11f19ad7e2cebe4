"""The rollout servers as one data-parallel leader uses them. A server that fails is ejected, and what it was asked for
is sampled again by the others.

While a server owes answers and has given none for a while, it is asked for a sign of life; after three misses it is
ejected. So a server that hangs costs a minute, not the deadline of a request. It may come back at a weight sync, once
it has got all weights and they were verified (loop/members.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from megatron_rl.errors import UserError
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.client import RefusedError, SGLangClient, UnreachableError
from megatron_rl.rollout.server import ServerError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_SECONDS = 10.0
"""After so long without an answer a server is asked for a sign of life, which it has as long to give. SGLang gives it
as soon as any request in its batch gets a token."""
MISSES = 3
REACH_SECONDS = 5.0
"""How long a server that is asked for no token has to answer."""


class Member:
    """One server."""

    def __init__(self, client: SGLangClient) -> None:
        self.client = client
        self.url = client.url
        self.pending = 0
        """Responses of the groups that were given to it, and have not come."""
        self.error: UserError | None = None
        """Why it was ejected; None while it is live."""
        self.requests: set[asyncio.Task[Any]] = set()
        self.heard = 0.0
        """Time of its last answer, on the event loop's clock."""
        self.watch: asyncio.Task[None] | None = None


class Fleet:
    """Make all calls from one event loop."""

    def __init__(self, clients: Sequence[SGLangClient]) -> None:
        """The next group goes to the first of the servers with the least to do."""
        self.members = [Member(client) for client in clients]
        self.paused = False
        """Set during weight syncs and while the trainer has the GPUs: servers give no answer and no sign of life."""

    def admit(self, clients: Sequence[SGLangClient], lost: Mapping[str, str]) -> None:
        """Makes these servers the live ones, after a weight sync. Ejects others; `lost` says by URL why.

        Servers keep their places, by which each leader begins with another one.
        """
        chosen = {client.url: client for client in clients}
        for member in self.members:
            if member.url not in chosen:
                why = lost.get(member.url, "the run does not use it any more")
                self.eject(member, RolloutError(f"{member.url}: {why}"))
        self.members = [
            Member(client) if member.error is not None and (client := chosen.get(member.url)) else member
            for member in self.members
        ]
        known = {member.url for member in self.members}
        self.members += [Member(client) for client in clients if client.url not in known]

    @property
    def live(self) -> list[Member]:
        """Raises the error of the ejected server, or RolloutError with those of all, if none is live."""
        live = [member for member in self.members if member.error is None]
        if live:
            return live
        errors = [member.error for member in self.members if member.error is not None]
        if len(errors) == 1:
            raise errors[0]
        raise RolloutError("no rollout server is left:\n" + "\n".join(map(str, errors)))

    def eject(self, member: Member, error: UserError) -> None:
        """Sends the server nothing any more; its requests raise EjectedError."""
        if member.error is not None:
            return
        member.error = error
        if others := sum(each.error is None for each in self.members):
            logger.warning("%s: ejected; %d other servers sample what it owes: %s", member.url, others, error)
        for request in member.requests:
            request.cancel()

    async def request(self, member: Member, ask: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """Returns the server's answer. Raises EjectedError if it gives none that can be used, or is ejected meanwhile,
        and RefusedError if another server would give none either."""
        task = asyncio.ensure_future(ask(member.client))
        if not member.requests:
            member.heard = asyncio.get_running_loop().time()
        if member.watch is None or member.watch.done():
            member.watch = asyncio.ensure_future(self._watch(member))
        member.requests.add(task)
        try:
            answer = await task
            member.heard = asyncio.get_running_loop().time()
            return answer
        except RefusedError:
            raise
        except (RolloutError, ServerError) as error:
            self.eject(member, error)
            raise EjectedError from None
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if member.error is None or (current is not None and current.cancelling()):
                raise
            raise EjectedError from None
        finally:
            member.requests.discard(task)

    async def _watch(self, member: Member) -> None:
        """Ejects the server if it gives no sign of life while it owes answers."""
        clock = asyncio.get_running_loop().time
        misses = 0
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            if not member.requests or member.error is not None:
                return
            is_fresh = self.paused or clock() - member.heard < PROBE_SECONDS
            if is_fresh or await _succeeds(member.client.health(), PROBE_SECONDS):
                misses = 0
                continue
            misses += 1
            if misses == MISSES:
                why = f"no sign of life for {clock() - member.heard:.0f} s, and {len(member.requests)} answers owed"
                self.eject(member, UnreachableError(f"{member.url}: {why}"))
                return


class EjectedError(Exception):
    """The server of a request was ejected."""


async def silent_servers(clients: Sequence[SGLangClient]) -> list[str]:
    """Returns the URLs of the servers that do not answer at all."""
    found = await asyncio.gather(*(_succeeds(client.model_info(), REACH_SECONDS) for client in clients))
    return [client.url for client, is_there in zip(clients, found, strict=True) if not is_there]


async def _succeeds(call: Coroutine[Any, Any, object], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await call
    except (RolloutError, ServerError, TimeoutError):
        return False
    return True
