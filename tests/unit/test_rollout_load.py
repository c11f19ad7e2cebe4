"""What a leader says of its servers while it samples."""

from __future__ import annotations

import asyncio

from megatron_rl.lab.console_page import ServerLoad
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.rollout.source import Leader


def test_responses_that_wait_for_a_place_are_counted() -> None:
    async def run() -> list[int]:
        sampler, end = Sampler(Fleet([]), 2), asyncio.Event()
        counts = [sampler.waiting]

        async def respond() -> None:
            async with sampler._slot():
                await end.wait()

        tasks = [asyncio.create_task(respond()) for _ in range(5)]
        await asyncio.sleep(0)
        counts.append(sampler.waiting)
        tasks[-1].cancel()  # a group has failed
        await asyncio.sleep(0.01)
        counts.append(sampler.waiting)
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [*counts, sampler.waiting]

    assert asyncio.run(run()) == [0, 3, 2, 0]


def test_a_leader_knows_its_live_servers() -> None:
    leader = Leader(["http://127.0.0.1:9", "http://127.0.0.1:10"], api_key=None, deadline=1.0)
    try:
        fleet = leader._fleet
        fleet.eject(fleet.members[0], RolloutError("gone"))
        assert leader.load == ServerLoad(live=1, servers=2, running=0, waiting=0)
    finally:
        leader.close()
