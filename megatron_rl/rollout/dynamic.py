"""DAPO's dynamic sampling [2503.14476, section 3.2]: which groups are trained on, and how many prompts to ask next.

Pure functions of what every rank knows of every group, so all ranks decide alike, and how the prompts were shared among
data-parallel leaders decides nothing. A group counts by its accuracy: shaped rewards differ in a group that is all
right, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_rl.config.schema import DynamicSamplingConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.data.sample import Group


class StepError(ConfigError):
    """A rollout that cannot be trained on; the same on every rank. The run ends, after a checkpoint."""


class DynamicSamplingError(StepError):
    """Too few groups with right and wrong answers."""


class LostVerdictsError(StepError):
    """No response of a step has a verdict."""


@dataclass(frozen=True)
class Tally:
    """What the ranks tell each other of a judged group."""

    index: int  # of its prompt in the order that the cursor gave them out in this step, from 0
    correct: int
    samples: int  # that have a verdict

    @classmethod
    def of(cls, group: Group) -> Self:
        verdicts = [sample.verdict for sample in group.samples if sample.verdict and not sample.verdict.lost]
        return cls(group.index, sum(verdict.correct for verdict in verdicts), len(verdicts))

    @property
    def mixed(self) -> bool:
        """Some answers are right and some wrong."""
        return 0 < self.correct < self.samples


def check_verdicts(tallies: Sequence[Tally]) -> None:
    """Raises LostVerdictsError when no sample of these groups has a verdict: there is nothing to learn from."""
    if tallies and not any(tally.samples for tally in tallies):
        raise LostVerdictsError(
            f"data.verifier: none of the responses to {len(tallies)} prompts has a verdict; warnings above say why. "
            "Fix the verifier, or raise reward.timeout or reward.memory_mib if it needs more, and --resume"
        )


@dataclass(frozen=True)
class Search:
    """One step's search for `wanted` mixed groups, after some rounds of prompts."""

    config: DynamicSamplingConfig
    wanted: int
    rounds: int = 0
    tallies: tuple[Tally, ...] = ()  # of all prompts so far, by index

    def next_count(self) -> int:
        """Prompts to ask in the next round; 0 when there are groups enough.

        Raises DynamicSamplingError when there are not, and no refill is left.
        """
        missing = self.wanted - len(self._mixed)
        if missing <= 0:
            return 0
        if self.rounds > self.config.max_refills:
            raise DynamicSamplingError(self._too_few())
        # Rounded, as 10 * 1.1 is above 11 in floating point.
        return math.ceil(round(missing * self.config.oversample, 6))

    def after(self, tallies: Sequence[Tally]) -> Search:
        """With one more round, whose tallies may come in any order.

        Raises ValueError when one is missing or there twice.
        """
        everything = (*self.tallies, *sorted(tallies, key=lambda tally: tally.index))
        if [tally.index for tally in everything] != list(range(len(everything))):
            raise ValueError("dynamic sampling: a group was lost, judged twice or numbered wrongly")
        return dataclasses.replace(self, rounds=self.rounds + 1, tallies=everything)

    def keep(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` that are among the first `wanted` mixed ones, numbered 0 to wanted - 1 over all leaders."""
        places = {tally.index: place for place, tally in enumerate(self._mixed[: self.wanted])}
        return [dataclasses.replace(group, index=places[group.index]) for group in groups if group.index in places]

    def figures(self) -> dict[str, float]:
        """prompts = kept + surplus + all_correct + all_wrong + groups without a verdict; surplus are mixed groups
        beyond those wanted."""
        kept = min(self.wanted, len(self._mixed))
        return {
            "prompts": float(len(self.tallies)),
            "kept": float(kept),
            "surplus": float(len(self._mixed) - kept),
            "all_correct": float(self._all_correct),
            "all_wrong": float(self._all_wrong),
            "refills": float(self.rounds - 1),
        }

    @property
    def _mixed(self) -> list[Tally]:
        return [tally for tally in self.tallies if tally.mixed]

    @property
    def _all_wrong(self) -> int:
        return sum(tally.correct == 0 < tally.samples for tally in self.tallies)

    @property
    def _all_correct(self) -> int:
        return sum(0 < tally.correct == tally.samples for tally in self.tallies)

    def _too_few(self) -> str:
        other = "harder" if self._all_correct > self._all_wrong else "easier"
        return (
            f"rollout.dynamic_sampling: {len(self._mixed)} of the {self.wanted} groups of a step have right and wrong "
            f"answers, after {self.config.max_refills} refills (max_refills); of {len(self.tallies)} prompts sampled, "
            f"{self._all_correct} were answered all right and {self._all_wrong} all wrong. --resume goes on with more "
            f"max_refills, or with fewer train.steps writes the model as it is; {other} prompts or a larger "
            "rollout.group_size need a new run"
        )
