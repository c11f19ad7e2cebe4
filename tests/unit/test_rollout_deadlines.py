"""Deadlines of answers do not count the time in which servers are paused."""

from __future__ import annotations

import asyncio

import pytest

from megatron_rl.rollout.deadlines import Deadlines
from megatron_rl.rollout.source import Leader

SECONDS = 0.2


async def wait(deadlines: Deadlines, begun: asyncio.Event) -> float:
    """Returns after how many seconds the deadline ended a wait."""
    clock = asyncio.get_running_loop().time
    start = clock()
    try:
        async with deadlines.within(SECONDS):
            begun.set()
            await asyncio.sleep(60)
    except TimeoutError:
        return clock() - start
    raise AssertionError("the wait was not ended")


async def paused_for(deadlines: Deadlines, seconds: float) -> None:
    deadlines.pause()
    deadlines.pause()  # says the same again
    await asyncio.sleep(seconds)
    deadlines.resume()


def test_a_pause_does_not_count() -> None:
    async def run() -> float:
        deadlines, begun = Deadlines(), asyncio.Event()
        waiting = asyncio.ensure_future(wait(deadlines, begun))
        await begun.wait()
        await paused_for(deadlines, 2 * SECONDS)
        await paused_for(deadlines, SECONDS)
        return await asyncio.wait_for(waiting, 10)

    assert 4 * SECONDS <= asyncio.run(run()) < 4 * SECONDS + 5


def test_a_deadline_of_a_pause_begins_after_it() -> None:
    async def run() -> float:
        deadlines = Deadlines()
        deadlines.pause()
        waiting = asyncio.ensure_future(wait(deadlines, asyncio.Event()))
        await asyncio.sleep(2 * SECONDS)
        assert not waiting.done()
        deadlines.resume()
        return await asyncio.wait_for(waiting, 10)

    assert asyncio.run(run()) >= 3 * SECONDS


def test_one_that_has_expired_does_not_disturb_a_pause() -> None:
    """Its body still cleans up."""

    async def clean_up(deadlines: Deadlines) -> None:
        async with deadlines.within(0.01):
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(3 * SECONDS)

    async def run() -> None:
        deadlines = Deadlines()
        cleaning = asyncio.ensure_future(clean_up(deadlines))
        await asyncio.sleep(SECONDS)
        await paused_for(deadlines, 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cleaning, 10)

    asyncio.run(run())


def test_each_leader_waits_while_the_trainer_has_the_gpus() -> None:
    """The servers are told by one leader alone."""
    leader = Leader(["http://127.0.0.1:1"], api_key=None, deadline=10)
    (client,) = leader.clients
    leader.release_memory(["weights", "kv_cache"], tell=False)
    waiting = leader.loop.start(wait(client.deadlines, asyncio.Event()))
    leader.resume_memory(["weights"], answers=False, tell=False)
    with pytest.raises(TimeoutError):
        waiting.result(3 * SECONDS)
    leader.resume_memory(["kv_cache"], answers=True, tell=False)
    assert waiting.result(10) > SECONDS
    leader.close()
