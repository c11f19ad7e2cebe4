"""Lets a step take the first groups that are done, of more than it needs (rollout.over_sampling)."""

from __future__ import annotations

import contextlib
import dataclasses

import orjson

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.loop.environment import Environment
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.rollout.flow import Flow
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.selection import Fact, choose, choose_again, leaves_room, times
from megatron_rl.stop import Interrupted

LOOK_SECONDS = 0.5
"""Longest time for which a leader waits for a group of its own before it hears of the other leaders' groups."""


def prompts_ahead(config: RolloutConfig, progress: Progress) -> int:
    """Returns how many prompts of steps after the next one are in flight with those of the next one, as far as there
    are such steps."""
    factor = 1 + config.lag if config.over_sampling is None else config.over_sampling
    wanted = times(config.prompts_per_step, factor) - config.prompts_per_step
    return min(wanted, config.prompts_per_step * (progress.steps - progress.step - 1))


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
        self._repeats = True  # whether all steps so far took the groups that they took before a resume
        self._chosen: list[Fact] = []  # of the step so far
        self._left: list[Fact] = []

    def choose(self, progress: Progress, count: int, first: int) -> list[int]:
        """Waits until `count` groups are done that the step may take as its groups from `first` on, and returns their
        numbers. Collective.

        A step that a resume makes again takes the groups that it took before. Raises Interrupted, on every rank, if a
        signal came meanwhile.
        """
        with self._trainer.journal.phase("rollout"):
            in_flight = count + prompts_ahead(self._config, progress)
            with together(self._trainer.place.control):
                if self._flow is not None:
                    self._flow.admit(progress.cursor, progress.taken, in_flight, progress.step)
            facts, chosen = self._choose_again(progress.step, count, first) if self._repeats else ([], None)
            if chosen is None:
                self._repeats = False
                facts, chosen = self._choose(progress.step, count)
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

    def _choose(self, step: int, count: int) -> tuple[list[Fact], list[Fact]]:
        """Returns what is known about the open groups, and those that the step takes. Collective."""
        config, trainer = self._config, self._trainer
        with together(trainer.place.control):
            if self._flow is not None:
                self._flow.replace_unfit(step, config.lag, self._environment.restart)
        facts = self._look(waits=False)
        while (chosen := choose(facts, count, step=step, lag=config.lag, prompts=config.prompts_per_step)) is None:
            facts = self._look(waits=True)
        return facts, chosen

    def _choose_again(self, step: int, count: int, first: int) -> tuple[list[Fact], list[Fact] | None]:
        """Returns what is known about the open groups, and those that the step took before the run was resumed; None if
        it took none, or if the run is resumed with another lag or size, which these groups do not fit. Collective."""
        config, facts = self._config, self._look(waits=False)
        numbers = self._recorded(step + 1, first)
        if len(numbers) != count or not set(numbers) <= {fact.number for fact in facts}:
            return facts, None
        while (chosen := choose_again(facts, numbers)) is None:
            facts = self._look(waits=True)
        fits = all(step - config.lag <= fact.oldest for fact in chosen)
        fits &= leaves_room(facts, chosen, step=step, lag=config.lag, prompts=config.prompts_per_step)
        return facts, chosen if fits else None

    def _recorded(self, step: int, first: int) -> list[int]:
        """Returns the numbers of the groups that this step took before the run was resumed; [] if it did not.
        Collective."""
        control, mine = self._trainer.place.control, b""
        with together(control):
            if self._trainer.place.rank == 0:
                mine = orjson.dumps(self._ledger.read_choice(step, first))
        recorded: list[int] = orjson.loads(broadcast_bytes(mine, control))
        return recorded

    def _look(self, *, waits: bool) -> list[Fact]:
        """Returns what is known about all leaders' open groups. `waits`: first for one more of them. Collective."""
        trainer = self._trainer
        mine: list[Fact] = []
        with together(trainer.place.control), contextlib.suppress(Interrupted):
            if self._flow is not None:
                if waits:
                    self._environment.wait_for_one(self._flow.unfinished, LOOK_SECONDS)
                mine = self._flow.facts()
        trainer.check_interrupted()
        parts = all_gather_bytes(orjson.dumps([dataclasses.astuple(fact) for fact in mine]), trainer.place.control)
        return [Fact(*row) for part in parts for row in orjson.loads(part)]
