"""Environments of a user's as real processes: one for each conversation, none of which outlives its end."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import turn_environments

from megatron_rl.config.schema import Config, RewardConfig
from megatron_rl.data.sample import Prompt
from megatron_rl.environments.env import EnvError
from megatron_rl.environments.episodes import Environments, Episode, EpisodeFailure, check_environment

PROMPT = Prompt("p", "3+5=", (), "end", "arithmetic")
RAISING = '            raise RuntimeError("the tool is broken")'
SAID = {"role": "assistant", "content": "abcdef"}


@pytest.fixture(scope="module")
def failing() -> Iterator[Environments]:
    with Environments("turn_environments:Failing", RewardConfig(timeout=2.0, memory_mib=1024)) as environments:
        environments.wait_until_ready()
        yield environments


def in_conversation(environments: Environments, what: Callable[[Episode], Awaitable[Any]], answer: str = "end") -> Any:
    async def run() -> Any:
        async with environments.episode() as episode:
            opening = await episode.reset(Prompt("p", "3+5=", (), answer, "arithmetic"))
            assert [message["content"] for message in opening.messages] == ["3+5="]
            await episode.step(SAID)
            return await what(episode)

    return asyncio.run(run())


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_conversations_are_independent_and_their_processes_end_with_them(failing: Environments) -> None:
    before = len(children())

    async def two() -> None:
        async with failing.episode() as one, failing.episode() as other:
            for each in (one, other):
                assert (await each.reset(PROMPT)).tools == [{"type": "function", "function": {"name": "fail"}}]
            first = [await one.step(SAID), await other.step(SAID)]
            assert [step.messages for step in first] == [[{"role": "user", "content": "+1 cdef"}]] * 2
            assert (await one.step(SAID)).done
            assert len(children()) == before + 2

    asyncio.run(two())
    wait_for(lambda: len(children()) == before)


def test_a_step_that_hangs_holds_up_nothing_and_leaves_no_process(failing: Environments) -> None:
    before = len(children())
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.05)

    async def hang(episode: Episode) -> None:
        ticking = asyncio.ensure_future(tick())
        begun = time.monotonic()
        with pytest.raises(EpisodeFailure, match="took over 2 s"):
            await episode.step(SAID)
        assert time.monotonic() - begun < 20
        ticking.cancel()
        assert any("sleep" in process.name() for process in children())

    in_conversation(failing, hang, "hang")
    assert len(ticks) > 10
    wait_for(lambda: len(children()) == before)
    assert in_conversation(failing, lambda episode: episode.step(SAID)).done


def test_a_step_that_raises_says_what_and_where(failing: Environments) -> None:
    line = inspect.getsource(turn_environments).splitlines().index(RAISING) + 1
    place = rf"\({re.escape(turn_environments.__file__)}, line {line}\)$"

    async def raising(episode: Episode) -> None:
        with pytest.raises(EpisodeFailure, match=rf"^RuntimeError: the tool is broken {place}"):
            await episode.step(SAID)

    in_conversation(failing, raising, "raise")


def test_all_processes_end_if_the_trainer_is_killed(tmp_path: Path) -> None:
    """The conversation hangs in a step when kill -9 ends the trainer."""
    code = """
import asyncio, sys
from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import Prompt
from megatron_rl.environments.episodes import Environments
async def run():
    with Environments("turn_environments:Failing", RewardConfig(timeout=600)) as environments:
        environments.wait_until_ready()
        async with environments.episode() as episode:
            await episode.reset(Prompt("p", "", (), "hang", ""))
            await episode.step({"content": "a"})
            await episode.step({"content": "a"})
asyncio.run(run())
"""
    path = os.pathsep.join(filter(None, sys.path))
    trainer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    started: list[psutil.Process] = []

    def hangs() -> bool:
        started[:] = psutil.Process(trainer.pid).children(recursive=True)
        return any(process.name() == "sleep" for process in started)

    wait_for(hangs)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in started))


def config(name: str, **rollout: Any) -> Config:
    sections = {"model": {"path": "/m"}, "data": {"train": "/d"}, "rollout": {"environment": {"name": name}, **rollout}}
    return Config.model_validate({"run_dir": "/r", "train": {"steps": 1}, **sections})


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("chess", "no such environment"),
        ("no_such_module:Env", "No module named 'no_such_module' (in the process that imports it)"),
        ("turn_environments:WithoutStep", "a class without step"),
        ("antigravity_of_tests:Env", "its process ended"),
    ],
)
def test_an_environment_that_does_not_start_is_an_error_that_names_the_key(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "antigravity_of_tests.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvError) as caught:
        check_environment(config(name))
    assert str(caught.value).startswith(f"rollout.environment.name: environment {name!r}: ")
    assert problem in str(caught.value)


def test_an_environment_that_starts_passes_and_saved_rollouts_need_none() -> None:
    check_environment(config("turn_environments:Adding"))
    check_environment(config("calculator"))
    check_environment(config("chess", replay_from="/saved"))
