"""Samples groups for prompts: one request per sample and turn, spread over the servers.

A group stays on one server with all its turns, whose prefix cache then computes each token once, unless that server
fails. On a GPU the samples depend on how the server batches requests, so a rollout is reproduced from its saved file,
not from a seed, unless the server runs with --enable-deterministic-inference. Then, and on a CPU, it uses the seed that
each request carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.data.versions import Versions
from megatron_rl.environments.env import EnvError
from megatron_rl.rollout.client import Completion, RolloutError, SGLangClient
from megatron_rl.rollout.fleet import EjectedError, Fleet, Member
from megatron_rl.rollout.turns import MultiTurn, append_completion, converse
from megatron_rl.routing.wire import RouteSpec

MAX_ABORTS = 3
"""Aborted answers in a row without a token to keep, after which a server has failed."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled, and what the answers are checked against."""

    samples: int  # per prompt
    max_response_tokens: int
    temperature: float
    vocab_size: int
    versions: Versions  # that the servers may answer with; they change while a request is in flight
    seed: int  # a request's seed follows from it, the weight version and the sample's number
    routes: RouteSpec | None = None  # ask for the experts that each token visited
    top_k: int = 0  # ask for that many of mu's most likely tokens at each token
    turns: MultiTurn | None = None  # with an environment; None: one response
    evaluates: bool = False  # then seeds differ from those of rollouts


class Sampler:
    """Bounds the requests in flight, and gives each group to the server with the fewest pending responses."""

    def __init__(self, fleet: Fleet, concurrency: int) -> None:
        self._fleet = fleet
        self._slots = asyncio.Semaphore(concurrency)
        self.waiting = 0
        """Samples of the groups that were asked for, and for which no request could be sent yet."""

    async def group(self, index: int, prompt: Prompt, sampling: Sampling) -> Group:
        """Samples a group. Requests are sent in the order of calls.

        Raises RolloutError, which names server and request, as soon as a sample fails on the last server that is live,
        and EnvError.
        """
        place = _Place(self._fleet, sampling.samples)
        version = sampling.versions.newest

        async def sample(number: int) -> Sample:
            async def ask(begun: Sample, max_new_tokens: int, turn: int) -> Sample:
                seed = request_seed(sampling.seed, version, index, number, turn, evaluates=sampling.evaluates)
                return await place.ask(Continuation(begun, max_new_tokens, seed, sampling).complete)

            async with self._slot():
                longest = sampling.max_response_tokens
                if sampling.turns is None:
                    made = await ask(Sample.start(prompt, number), longest, 0)
                else:
                    made = await converse(sampling.turns, prompt, number, longest, ask)
                place.count_sample()
                return made

        try:
            async with asyncio.TaskGroup() as tasks:
                started = [tasks.create_task(sample(number)) for number in range(sampling.samples)]
        except* Exception as failures:
            raise failures.exceptions[0] from None
        finally:
            place.leave()
        return _group(index, [task.result() for task in started])

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among the requests in flight."""
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._slots.release()


class _Place:
    """The server of a group, chosen when its first request is sent, so that a slow server gets fewer groups; another
    one if that is ejected."""

    def __init__(self, fleet: Fleet, samples: int) -> None:
        self._fleet = fleet
        self._to_come = samples
        self._home: Member | None = None

    async def ask(self, request: Callable[[SGLangClient], Coroutine[Any, Any, Sample]]) -> Sample:
        """Returns what `request` does with a server, or with another one if that fails. Raises RolloutError if none is
        left."""
        while True:
            try:
                return await self._fleet.request(self._live_home(), request)
            except EjectedError:
                continue

    def count_sample(self) -> None:
        """Notes that one is sampled."""
        self._to_come -= 1
        self._live_home().pending -= 1

    def leave(self) -> None:
        """Ends what is still to come, if the group has failed."""
        if self._home is not None:
            self._home.pending -= self._to_come

    def _live_home(self) -> Member:
        if self._home is None or self._home.error is not None:
            self._home = min(self._fleet.live, key=lambda member: member.pending)
            self._home.pending += self._to_come
        return self._home


class Continuation:
    """What follows the tokens of a sample. It keeps what servers have sampled when they abort, and goes on from there.

    An aborted answer may end with a token that ends a response, because SGLang stops to look for one once a request is
    aborted. So its last token is sampled again. Under speculative decoding a pass samples several tokens, any of which
    may be such a one; then nothing is kept.
    """

    def __init__(self, sample: Sample, max_new_tokens: int, seed: int, sampling: Sampling) -> None:
        self._sample = sample
        self._longest = len(sample.token_ids) + max_new_tokens
        self._seed = seed  # also of what follows kept tokens: SGLang draws by seed and position
        self._sampling = sampling

    async def complete(self, client: SGLangClient) -> Sample:
        """Returns the sample up to its own end or to the length limit. Raises RolloutError if there is none within one
        deadline."""
        sampling, useless = self._sampling, 0
        where = f"{client.url}: prompt {self._sample.prompt.id!r}"
        try:
            async with client.deadlines.within(client.deadline):
                while useless < MAX_ABORTS:
                    completion = await client.generate(
                        self._sample.token_ids.tolist(),
                        max_new_tokens=self._longest - len(self._sample.token_ids),
                        temperature=sampling.temperature,
                        vocab_size=sampling.vocab_size,
                        versions=sampling.versions,
                        seed=self._seed,
                        routes=sampling.routes,
                        top_k=sampling.top_k,
                        stop=() if sampling.turns is None else sampling.turns.dialogue.stop_token_ids,
                    )
                    if completion.finish_reason != "abort":
                        return append_completion(self._sample, completion)
                    useless = 0 if self._keep(completion) else useless + 1
        except TimeoutError:
            raise RolloutError(f"{where}: no complete response within {client.deadline:g} s") from None
        raise RolloutError(f"{where}: the server aborted it {MAX_ABORTS} times without a token")

    def _keep(self, aborted: Completion) -> bool:
        """Appends the tokens of an aborted answer, and tells whether there are any that have all that was asked for."""
        lacks_routes = self._sampling.routes is not None and aborted.trace is None
        lacks_top_tokens = self._sampling.top_k > 0 and aborted.top_tokens is None
        if len(aborted.token_ids) < 2 or lacks_routes or lacks_top_tokens or aborted.speculative:
            return False
        self._sample = append_completion(self._sample, aborted.without_last())
        return True


async def rollout_groups(sampler: Sampler, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
    """Samples a group for each (number, prompt), in this order. Raises RolloutError as soon as one fails, and cancels
    the rest."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(sampler.group(index, prompt, sampling)) for index, prompt in prompts]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in started]


def request_seed(seed: int, version: int, group: int, number: int, turn: int = 0, *, evaluates: bool = False) -> int:
    """A seed in [0, 2**63), different for each turn, sample, group and weight version, for each seed of a run, and for
    rollouts and evaluations."""
    words = np.random.SeedSequence([seed, version, group, number, turn, *([1] if evaluates else [])])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _group(index: int, samples: Sequence[Sample]) -> Group:
    """Raises EnvError if an environment has opened conversations on one prompt in different ways."""
    prompt = samples[0].prompt
    if any(sample.prompt != prompt for sample in samples):
        raise EnvError(
            f"rollout.environment: prompt {prompt.id!r}: reset returned other messages for another sample; "
            "advantages compare answers to one prompt, so what differs belongs into step"
        )
    return Group(index, prompt, tuple(samples))
