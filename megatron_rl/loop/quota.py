"""Lets a step take the first groups that are done, of more than it needs (rollout.over_sampling)."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import orjson

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.loop.environment import Environment
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.rollout.flow import Flow
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.selection import Fact, choose, choose_again, untaken
from megatron_rl.stop import Interrupted

LOOK_SECONDS = 0.5
"""Longest time for which a leader waits for a group of its own before it hears of the other leaders' groups."""


def prompts_in_flight(config: RolloutConfig, progress: Progress) -> int:
    """Returns how many prompts are in flight when a step begins: its own, and those of steps after it, as far as there
    are such steps."""
    times = 1 + config.lag if config.over_sampling is None else config.over_sampling
    wanted = math.ceil(round(config.prompts_per_step * times, 6))  # rounded, as 10 * 1.1 is above 11
    return min(wanted, config.prompts_per_step * (progress.steps - progress.step))


class Quota:
    """Every rank has one, and calls it with the others."""

    def __init__(
        self, config: RolloutConfig, trainer: Trainer, environment: Environment, ledger: Ledger, flow: Flow | None
    ) -> None:
        """`flow`: None on ranks that lead no replica."""
        self._config = config
        self._trainer = trainer
        self._environment = environment
        self._ledger = ledger
        self._flow = flow
        self._chosen: list[Fact] = []  # of the step so far
        self._left: list[Fact] = []

    def choose(self, progress: Progress, count: int, first: int, in_flight: int) -> list[int]:
        """Waits until `count` groups are done that the step may take as its groups from `first` on, and returns their
        numbers. Until then `in_flight` prompts, or `count` if that is more, are in flight. Collective.

        A step that a resume makes again takes the groups that it took before. Raises Interrupted, on every rank, if a
        signal came meanwhile.
        """
        with self._trainer.journal.phase("rollout"):
            in_flight = max(in_flight, count)
            again = self._recorded(progress, count, first, in_flight)
            config = self._config
            facts = self._look(progress, in_flight, waits=False)
            while True:
                if again:
                    chosen = choose_again(facts, again)
                else:
                    chosen = choose(facts, count, step=progress.step, lag=config.lag, prompts=config.prompts_per_step)
                if chosen is not None:
                    break
                facts = self._look(progress, in_flight, waits=True)
            numbers = [fact.number for fact in chosen]
            with self._trainer.writing(f"the choice of step {progress.step + 1}", self._trainer.run.pending):
                if self._trainer.place.rank == 0:
                    self._ledger.write_choice(progress.step + 1, first, numbers)
        self._chosen = [*(self._chosen if first else ()), *chosen]
        self._left = [fact for fact in facts if fact.number not in numbers]
        return numbers

    def figures(self, step: int) -> dict[str, float]:
        """Metrics of the step's groups, the same on every rank."""
        carried = sum(fact.oldest < step for fact in self._chosen)
        return {
            "over_sampling/carried_over": carried / len(self._chosen),
            "over_sampling/left_done": float(sum(fact.done for fact in self._left)),
            "over_sampling/left_unfinished": float(sum(not fact.done for fact in self._left)),
        }

    def _recorded(self, progress: Progress, count: int, first: int, in_flight: int) -> list[int]:
        """Returns the numbers that this step has taken before the run was resumed; [] if it did not, or if the run is
        resumed with other sizes."""
        mine = b"[]"
        if self._trainer.place.rank == 0 and self._flow is not None:
            numbers = self._ledger.read_choice(progress.step + 1, first)
            there = untaken(self._flow.number(progress.cursor), progress.taken, in_flight)
            if len(numbers) == count and set(numbers) <= set(there):
                mine = orjson.dumps(numbers)
        recorded: list[int] = orjson.loads(broadcast_bytes(mine, self._trainer.place.control))
        return recorded

    def _look(self, progress: Progress, in_flight: int, *, waits: bool) -> list[Fact]:
        """Starts what is missing, and returns what is known about all leaders' open groups. Collective."""
        trainer = self._trainer
        mine: list[Fact] = []
        with together(trainer.place.control), contextlib.suppress(Interrupted):
            if self._flow is not None:
                self._flow.admit(progress.cursor, progress.taken, in_flight, progress.step)
                if waits:
                    self._environment.wait_for_one(self._flow.unfinished, LOOK_SECONDS)
                mine = self._flow.facts()
        trainer.check_interrupted()
        parts = all_gather_bytes(orjson.dumps([dataclasses.astuple(fact) for fact in mine]), trainer.place.control)
        return [Fact(*row) for part in parts for row in orjson.loads(part)]
