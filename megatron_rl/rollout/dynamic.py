"""DAPO's dynamic sampling [2503.14476, section 3.2]: chooses the groups to train on and the number of prompts to ask.

These are pure functions of facts that every rank knows about every group. So all ranks decide alike, and the split of
prompts among data-parallel leaders has no influence. A group counts by its accuracy, because shaped rewards also differ
in a group whose answers are all right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_rl.config.dynamic_sampling import DynamicSamplingConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.data.sample import Group
from megatron_rl.rollout.selection import times


class StepError(ConfigError):
    """The rollout cannot be trained on. Every rank raises it, and the run ends after a checkpoint."""


class DynamicSamplingError(StepError):
    """Too few groups have both right and wrong answers."""


class LostVerdictsError(StepError):
    """No response of a step has a verdict."""


@dataclass(frozen=True)
class Tally:
    """Facts about a judged group that ranks exchange."""

    index: int  # of its prompt, from 0, in the order of the cursor in this step
    correct: int
    samples: int  # with a verdict

    @classmethod
    def of(cls, group: Group) -> Self:
        verdicts = [sample.verdict for sample in group.samples if sample.verdict and not sample.verdict.lost]
        return cls(group.index, sum(verdict.correct for verdict in verdicts), len(verdicts))

    @property
    def mixed(self) -> bool:
        """Whether some answers are right and some are wrong."""
        return 0 < self.correct < self.samples


def check_verdicts(tallies: Sequence[Tally]) -> None:
    """Raises LostVerdictsError if no sample of these groups has a verdict, so that there is nothing to learn from."""
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
    tallies: tuple[Tally, ...] = ()  # of all prompts so far, sorted by index

    def next_count(self) -> int:
        """Number of prompts to ask in the next round; 0 if there are enough groups.

        Raises DynamicSamplingError if there are too few groups and no refill is left.
        """
        missing = self.wanted - len(self._mixed)
        if missing <= 0:
            return 0
        if self.rounds > self.config.max_refills:
            raise DynamicSamplingError(self._too_few())
        return times(missing, self.config.oversample)

    def after(self, tallies: Sequence[Tally]) -> Search:
        """The search after one more round, whose tallies may be in any order.

        Raises ValueError if a tally is missing or occurs twice.
        """
        everything = (*self.tallies, *sorted(tallies, key=lambda tally: tally.index))
        if [tally.index for tally in everything] != list(range(len(everything))):
            raise ValueError("dynamic sampling: a group was lost, judged twice or numbered wrongly")
        return dataclasses.replace(self, rounds=self.rounds + 1, tallies=everything)

    def keep(self, groups: Sequence[Group]) -> list[Group]:
        """Keeps the `groups` among the first `wanted` mixed ones, numbered 0 to wanted - 1 over all leaders."""
        places = {tally.index: place for place, tally in enumerate(self._mixed[: self.wanted])}
        return [dataclasses.replace(group, index=places[group.index]) for group in groups if group.index in places]

    def figures(self) -> dict[str, float]:
        """Metrics of the search. Surplus groups are mixed but not needed.

        prompts = kept + surplus + all_correct + all_wrong + groups without a verdict.
        """
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
