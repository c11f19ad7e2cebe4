"""From prompts to groups of samples: one request per sample, spread over the servers.

Sampling is random on the server (its --random-seed fixes it only for the same requests in the same batches), so a
rollout is reproduced from its saved file, not from a seed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.rollout.client import Completion, RolloutError, SGLangClient

MAX_ABORTS = 3
"""How often a request that the server aborted is sent again."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled, and what their answers are checked against."""

    samples: int  # per prompt
    max_response_tokens: int
    temperature: float
    concurrency: int
    vocab_size: int
    versions: frozenset[int]  # weight versions that the servers may hold


class Spread:
    """Bounds the requests in flight, and gives each to the server with the fewest."""

    def __init__(self, clients: Sequence[SGLangClient], concurrency: int) -> None:
        self._clients = clients
        self._in_flight = dict.fromkeys(range(len(clients)), 0)
        self._slots = asyncio.Semaphore(concurrency)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """Raises RolloutError when no complete answer could be had."""
        async with self._slots:
            number = min(self._in_flight, key=lambda n: self._in_flight[n])
            self._in_flight[number] += 1
            try:
                for _ in range(MAX_ABORTS):
                    completion = await self._clients[number].generate(
                        prompt.token_ids,
                        max_new_tokens=sampling.max_response_tokens,
                        temperature=sampling.temperature,
                        vocab_size=sampling.vocab_size,
                        versions=sampling.versions,
                    )
                    if completion.finish_reason != "abort":
                        return completion
            finally:
                self._in_flight[number] -= 1
        url = self._clients[number].url
        raise RolloutError(f"{url}: prompt {prompt.id!r}: aborted {MAX_ABORTS} times; nothing was sampled")


async def rollout_groups(
    clients: Sequence[SGLangClient], prompts: Sequence[tuple[int, Prompt]], sampling: Sampling
) -> list[Group]:
    """A group for each (index in the rollout batch, prompt), in their order. Raises RolloutError."""
    spread = Spread(clients, sampling.concurrency)

    async def sample(prompt: Prompt, index: int) -> Sample:
        completion = await spread.generate(prompt, sampling)
        return as_sample(prompt, index, completion)

    async def group(index: int, prompt: Prompt) -> Group:
        samples = await asyncio.gather(*(sample(prompt, i) for i in range(sampling.samples)))
        return Group(index, prompt, tuple(samples))

    try:
        async with asyncio.TaskGroup() as tasks:  # the first failure cancels the rest
            started = [tasks.create_task(group(index, prompt)) for index, prompt in prompts]
    except* RolloutError as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in started]


def as_sample(prompt: Prompt, index: int, completion: Completion) -> Sample:
    """One span of the sample for each weight version that generated it."""
    sample = Sample.start(prompt, index)
    for span in completion.versions:
        sample = sample.extend(
            list(completion.token_ids[span.start : span.end]),
            list(completion.logprobs[span.start : span.end]),
            span.version,
        )
    return dataclasses.replace(sample, finish_reason=completion.finish_reason)
