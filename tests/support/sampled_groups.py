"""Groups that are sampled through proxies to a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from fault_proxy import FaultProxy
from tiny_models import VOCAB_SIZE

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups


def make_prompts(count: int, first: int = 0) -> list[tuple[int, Prompt]]:
    """Returns random prompts, numbered from `first` on."""
    drawn = (tuple(np.random.default_rng(n).integers(2, VOCAB_SIZE, 6).tolist()) for n in range(count))
    return [(first + n, Prompt(f"p{n}", "", ids, "", "")) for n, ids in enumerate(drawn)]


def collect(
    proxies: Sequence[FaultProxy],
    prompts: Sequence[tuple[int, Prompt]],
    sampling: Sampling,
    concurrency: int,
    *,
    deadline: float = 60.0,
    repeats: int = 1,
    see: Callable[[Fleet], None] = lambda fleet: None,
) -> list[Group]:
    """Starts the proxies and samples a group for each prompt, `repeats` times. `see` gets the fleet before and after.
    Returns the last groups."""

    async def run() -> list[Group]:
        for proxy in proxies:
            await proxy.__aenter__()
        clients = [SGLangClient(proxy.url, deadline=deadline) for proxy in proxies]
        see(fleet := Fleet(clients))
        groups: list[Group] = []
        try:
            for _ in range(repeats):
                groups = await rollout_groups(Sampler(fleet, concurrency), prompts, sampling)
            see(fleet)
        finally:
            for client, proxy in zip(clients, proxies, strict=True):
                await client.close()
                await proxy.__aexit__()
        return groups

    return asyncio.run(run())
