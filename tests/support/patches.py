"""Patches of the package in a forked run; they are passed as `before` to Forks.start."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


def slow_steps(seconds: float) -> None:
    """Makes all optimizer steps after the first print a line and take `seconds`."""
    from megatron_rl.loop.trainer import Trainer

    update = Trainer.update
    steps: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        if steps:
            print("slow step", flush=True)
            time.sleep(seconds)
        steps.append(1)
        return update(*arguments, **options)

    Trainer.update = slow  # type: ignore[method-assign]


def record_moves(file: str) -> None:
    """Writes how often each function has told that something moves."""
    from megatron_rl.ranks.activity import Activity

    move, callers = Activity.move, Counter[str]()

    def recorded(activity: Activity) -> None:
        callers[sys._getframe(1).f_code.co_name] += 1
        Path(file).write_text(json.dumps(callers))
        move(activity)

    Activity.move = recorded  # type: ignore[method-assign, assignment]


def wait_less() -> None:
    """Makes a rank wait two seconds for another rank's answers and marks, not ten."""
    from megatron_rl.ranks import marks, meeting

    meeting.ANSWER_SECONDS = marks.SEEN_SECONDS = 2.0


def sample_little_of_a_model() -> None:
    """Makes a resume see so little of the model's files that it misses most changes, as in files of gigabytes."""
    from megatron_rl.models import identity

    identity.WHOLE_BYTES, identity.SAMPLES, identity.SAMPLE_BYTES = 10_000, 2, 64


def made_up_rollouts(seconds: float = 0.0) -> None:
    """Makes up answers without servers. The second rollout prints a line and takes `seconds`, if that is not 0."""
    from dynamic_worker import MadeUp, replace_servers

    class Leader(MadeUp):
        async def group(self, number: int, prompt: Any, sampling: Any) -> Any:
            if seconds and sampling.versions.newest == 1:
                print("slow rollout", flush=True)
                await asyncio.sleep(seconds)
            return await super().group(number, prompt, sampling)

    replace_servers(Leader)


def slow_first_sync(seconds: float) -> None:
    """Makes the first weight sync of a run without servers take `seconds`; apply it after `made_up_rollouts`."""
    from dynamic_worker import NoServers

    push = NoServers.push
    pushed: list[int] = []

    def slow(sync: NoServers, version: int) -> dict[str, float]:
        if not pushed:
            time.sleep(seconds)
        pushed.append(version)
        return push(sync, version)

    NoServers.push = slow  # type: ignore[method-assign, assignment]


def failing_first_sync() -> None:
    """Ends the first weight sync with an error."""
    from megatron_rl.rollout.answers import RolloutError
    from megatron_rl.weights.sync import WeightSync

    def push(sync: WeightSync, version: int) -> dict[str, float]:
        raise RolloutError(f"weight version {version}: refused")

    WeightSync.push = push  # type: ignore[method-assign, assignment]


def slow_evaluations(seconds: float) -> None:
    """Makes each evaluation take `seconds`."""
    from megatron_rl.loop.environment import Environment

    evaluate = Environment.evaluate

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return evaluate(*arguments, **options)

    Environment.evaluate = slow  # type: ignore[method-assign]


def chance_rollouts(slow_from: int, delay: float = 0.0) -> None:
    """Makes up answers by chance, without servers. Prompts from that number on are never answered. Every third prompt
    takes `delay` seconds times its number."""
    from dynamic_worker import MadeUp, replace_servers

    from megatron_rl.data.sample import Prompt

    class Leader(MadeUp):
        async def group(self, number: int, prompt: Prompt, sampling: Any) -> Any:
            if number >= slow_from:
                print("slow rollout", flush=True)
                await asyncio.sleep(1000)
            if delay and number % 3 == 1:
                await asyncio.sleep(delay * number)
            other = dataclasses.replace(prompt, id=os.urandom(8).hex())  # answers follow from it
            group = await super().group(number, other, sampling)
            samples = tuple(dataclasses.replace(sample, prompt=prompt) for sample in group.samples)
            return dataclasses.replace(group, prompt=prompt, samples=samples)

    replace_servers(Leader)


def fault_deep_in_a_library(kind: str) -> None:
    """Raises an exception that the program does not expect."""
    from megatron_rl.ranks import agreement

    def failing(*_: object) -> None:
        raise {"FileNotFoundError": FileNotFoundError, "TypeError": TypeError}[kind]("libdeep.so")

    agreement.local_files = failing  # type: ignore[assignment]


def slow_copies(seconds: float) -> None:
    """Makes the copy of each tensor of a checkpoint begin late."""
    from megatron_rl.engine import checkpoint_writer

    copy = checkpoint_writer._copy

    def slow(tensor: Any) -> Any:
        time.sleep(seconds)
        return copy(tensor)

    checkpoint_writer._copy = slow


def slow_files(seconds: float, rank: int = 0, failure: str = "") -> None:
    """Makes the file of one rank late in all checkpoints after the first; with `failure` it then fails."""
    from megatron_rl.engine import checkpoint_writer

    write = checkpoint_writer.write_tensors

    def slow(path: Any, *arguments: Any) -> Any:
        if path.name == f"rank-{rank:05d}.safetensors" and "step-000001" not in str(path):
            time.sleep(seconds)
            if failure:
                raise OSError(errno.EIO, failure)
        return write(path, *arguments)

    checkpoint_writer.write_tensors = slow  # type: ignore[assignment]


def fails_in_step(step: int) -> None:
    """Raises an error in the optimizer step of that number."""
    from megatron_rl.errors import UserError
    from megatron_rl.loop.trainer import Trainer

    update = Trainer.update
    steps = iter(range(1, step))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(steps, None) is None:
            raise UserError(f"step {step} fails")
        return update(*arguments, **options)

    Trainer.update = failing  # type: ignore[method-assign]


def tell_phases() -> None:
    """Prints the name of each phase as it begins."""
    from megatron_rl.lab.journal import Journal

    phase = Journal.phase

    def told(journal: Journal, name: str) -> Any:
        print(f"phase {name}", flush=True)
        return phase(journal, name)

    Journal.phase = told  # type: ignore[method-assign, assignment]
