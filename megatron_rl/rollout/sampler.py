"""Samples groups for prompts: one request per sample and turn, spread over the servers.

A group stays on one server with all its turns, whose prefix cache then computes each token once, unless that server
fails. On a GPU the samples depend on how the server batches requests, so a rollout is reproduced from its saved file,
not from a seed, unless the server runs with --enable-deterministic-inference. Then, and on a CPU, it uses the seed that
each request carries.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
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
"""Most times that a request is sent if the server aborts it."""


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


class Sampler:
    """Bounds the requests in flight, and gives each group to the server with the fewest pending responses."""

    def __init__(self, fleet: Fleet, concurrency: int) -> None:
        self._fleet = fleet
        self._slots = asyncio.Semaphore(concurrency)

    async def group(self, index: int, prompt: Prompt, sampling: Sampling) -> Group:
        """Samples a group. Requests are sent in the order of calls.

        Raises RolloutError, which names server and request, as soon as a sample fails on the last server that is live,
        and EnvError.
        """
        place = _Place(self._fleet, sampling.samples)
        version = sampling.versions.newest

        async def sample(number: int) -> Sample:
            async def ask(ids: Sequence[int], max_new_tokens: int, turn: int) -> Completion:
                seed = request_seed(sampling.seed, version, index, number, turn)
                return await place.ask(lambda client: complete(client, prompt.id, ids, max_new_tokens, seed, sampling))

            async with self._slots:
                longest = sampling.max_response_tokens
                if sampling.turns is None:
                    completion = await ask(prompt.token_ids, longest, 0)
                    made = append_completion(Sample.start(prompt, number), completion)
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


class _Place:
    """The server of a group, chosen when its first request is sent, so that a slow server gets fewer groups; another
    one if that is ejected."""

    def __init__(self, fleet: Fleet, samples: int) -> None:
        self._fleet = fleet
        self._to_come = samples
        self._home: Member | None = None

    async def ask(self, request: Callable[[SGLangClient], Coroutine[Any, Any, Completion]]) -> Completion:
        """Returns a complete answer, of another server if one fails. Raises RolloutError if there is none."""
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


async def complete(
    client: SGLangClient, name: str, token_ids: Sequence[int], max_new_tokens: int, seed: int, sampling: Sampling
) -> Completion:
    """What follows the ids of the prompt of this name, up to its own end or to the length limit. If it is aborted, it
    is sampled again, within one deadline."""
    where = f"{client.url}: prompt {name!r}"
    try:
        async with asyncio.timeout(client.deadline):
            for _ in range(MAX_ABORTS):
                completion = await client.generate(
                    token_ids,
                    max_new_tokens=max_new_tokens,
                    temperature=sampling.temperature,
                    vocab_size=sampling.vocab_size,
                    versions=sampling.versions,
                    seed=seed,
                    routes=sampling.routes,
                    top_k=sampling.top_k,
                    stop=() if sampling.turns is None else sampling.turns.dialogue.stop_token_ids,
                )
                if completion.finish_reason != "abort":
                    return completion
    except TimeoutError:
        raise RolloutError(f"{where}: no complete response within {client.deadline:g} s") from None
    raise RolloutError(f"{where}: the server aborted it {MAX_ABORTS} times")


async def rollout_groups(sampler: Sampler, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
    """Samples a group for each (number, prompt), in this order. Raises RolloutError as soon as one fails, and cancels
    the rest."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(sampler.group(index, prompt, sampling)) for index, prompt in prompts]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in started]


def request_seed(seed: int, version: int, group: int, number: int, turn: int = 0) -> int:
    """A seed in [0, 2**63), different for each turn, sample, group and weight version, and for each seed of a run."""
    words = np.random.SeedSequence([seed, version, group, number, turn])
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
