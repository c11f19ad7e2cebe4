"""Samples groups for prompts: one request per sample, spread over the servers.

A group stays on one server, whose prefix cache then computes the prompt once, unless that server fails. The samples
depend on how the server batches requests, so a rollout is reproduced from its saved file, not from a seed. The
exception is a GPU server with --enable-deterministic-inference, which uses the seed that each request carries.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.rollout.client import Completion, RolloutError, SGLangClient
from megatron_rl.rollout.fleet import EjectedError, Fleet, Member
from megatron_rl.routing.wire import RouteSpec

MAX_ABORTS = 3
"""Most times that a request is sent if the server aborts it."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled, and what the answers are checked against."""

    samples: int  # per prompt
    max_response_tokens: int
    temperature: float
    concurrency: int
    vocab_size: int
    versions: frozenset[int]  # weight versions that the servers may hold
    seed: int  # a request's seed follows from it, the versions and the sample's position in the batch
    routes: RouteSpec | None = None  # ask for the experts that each token visited
    top_k: int = 0  # ask for that many of mu's most likely tokens at each token


class _Spread:
    """Bounds the requests in flight, and gives each group to the server with the fewest pending responses."""

    def __init__(self, fleet: Fleet, sampling: Sampling) -> None:
        self._fleet = fleet
        self._sampling = sampling
        self._pending = dict.fromkeys(fleet.members, 0)
        self._to_come: dict[int, int] = {}  # by group
        self._homes: dict[int, Member] = {}
        self._slots = asyncio.Semaphore(sampling.concurrency)

    async def generate(self, group: int, prompt: Prompt, seed: int) -> Completion:
        """Returns a complete answer, of another server if one fails. Raises RolloutError if there is none."""
        async with self._slots:
            while True:
                home = self._home(group)
                try:
                    completion = await self._fleet.request(
                        home, lambda client: complete(client, prompt, seed, self._sampling)
                    )
                except EjectedError:
                    continue
                self._pending[self._homes[group]] -= 1
                self._to_come[group] -= 1
                return completion

    def _home(self, group: int) -> Member:
        """The group's server, chosen when its first request is sent, so that a slow server gets fewer groups; another
        one if that is ejected."""
        home = self._homes.get(group)
        if home is None or home.error is not None:
            home = min(self._fleet.live, key=self._pending.__getitem__)
            self._pending[home] += self._to_come.setdefault(group, self._sampling.samples)
            self._homes[group] = home
        return home


async def complete(client: SGLangClient, prompt: Prompt, seed: int, sampling: Sampling) -> Completion:
    """A response that ended by itself or at the length limit. An aborted one is sampled again, within one deadline."""
    where = f"{client.url}: prompt {prompt.id!r}"
    try:
        async with asyncio.timeout(client.deadline):
            for _ in range(MAX_ABORTS):
                completion = await client.generate(
                    prompt.token_ids,
                    max_new_tokens=sampling.max_response_tokens,
                    temperature=sampling.temperature,
                    vocab_size=sampling.vocab_size,
                    versions=sampling.versions,
                    seed=seed,
                    routes=sampling.routes,
                    top_k=sampling.top_k,
                )
                if completion.finish_reason != "abort":
                    return completion
    except TimeoutError:
        raise RolloutError(f"{where}: no complete response within {client.deadline:g} s") from None
    raise RolloutError(f"{where}: the server aborted it {MAX_ABORTS} times")


async def rollout_groups(fleet: Fleet, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
    """Samples a group for each (index in the rollout batch, prompt), in this order.

    Raises RolloutError, which names server and request, as soon as a sample fails on the last server that is live, and
    cancels the rest.
    """
    spread = _Spread(fleet, sampling)

    async def sample(index: int, prompt: Prompt, number: int) -> Sample:
        completion = await spread.generate(index, prompt, request_seed(sampling, index, number))
        return as_sample(prompt, number, completion)

    try:
        async with asyncio.TaskGroup() as tasks:
            started = [
                [tasks.create_task(sample(index, prompt, number)) for number in range(sampling.samples)]
                for index, prompt in prompts
            ]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [
        Group(index, prompt, tuple(task.result() for task in group))
        for (index, prompt), group in zip(prompts, started, strict=True)
    ]


def request_seed(sampling: Sampling, group: int, number: int) -> int:
    """A seed in [0, 2**63), different for each sample, group and weight version."""
    words = np.random.SeedSequence([sampling.seed, max(sampling.versions), group, number])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


def as_sample(prompt: Prompt, index: int, completion: Completion) -> Sample:
    """The sample of an answer, with a span for each weight version, and with the routing trace and mu's most likely
    tokens if the answer has them."""
    sample = Sample.start(prompt, index)
    for span in completion.versions:
        sample = sample.extend(
            list(completion.token_ids[span.start : span.end]),
            list(completion.logprobs[span.start : span.end]),
            span.version,
        )
    if completion.trace is not None:
        sample = sample.with_trace(completion.trace)
    if completion.top_tokens is not None:
        sample = sample.with_top_tokens(completion.top_tokens)
    return dataclasses.replace(sample, finish_reason=completion.finish_reason)
