"""One leader's groups of the run's prompts, some of them started ahead of the step that trains on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_rl.data.prompts import PromptCursor, PromptDataset
from megatron_rl.data.sample import Group, Prompt
from megatron_rl.rollout.ledger import is_of_age, oldest_version
from megatron_rl.rollout.selection import Fact, untaken

Start = Callable[[int, Prompt], "Future[Group]"]
"""Begins to sample and judge a group. The number of its prompt counts from the beginning of the run, over all leaders
and epochs."""


@dataclass(frozen=True)
class Begun:
    """A group that was started with weights of this version."""

    group: Future[Group]
    version: int

    @property
    def oldest(self) -> int:
        """The weight version of the group's oldest token, or of its start until it is done. Raises its error."""
        return oldest_version(self.group.result()) if self.group.done() else self.version


class Flow:
    def __init__(self, dataset: PromptDataset, start: Start, share: int, of: int) -> None:
        """This leader has number `share` of every `of` prompts."""
        self._dataset = dataset
        self._start = start
        self._share = share
        self._of = of
        self._ahead: PromptCursor | None = None  # after all that were started
        self.open: dict[int, Begun] = {}
        """Groups that were started and that no step has taken, by the number of their prompt."""

    def number(self, cursor: PromptCursor) -> int:
        """Returns the number of the next prompt."""
        return cursor.epoch * len(self._dataset) + cursor.position

    def cursor(self, number: int, seed: int) -> PromptCursor:
        """Returns the cursor at the prompt of this number."""
        return PromptCursor(seed, *divmod(number, len(self._dataset)))

    def admit(self, cursor: PromptCursor, taken: Collection[int], count: int, version: int) -> None:
        """Starts, with weights of this version, what is not started of the next `count` prompts that are not taken."""
        if self._ahead is None:
            self._ahead = cursor
        first = self.number(self._ahead)
        if (missing := untaken(self.number(cursor), taken, count)[-1] + 1 - first) <= 0:
            return
        prompts, self._ahead = self._dataset.take(self._ahead, missing)
        taken = frozenset(taken)
        for number, prompt in enumerate(prompts, first):
            if number % self._of == self._share and number not in taken:
                self.open[number] = Begun(self._start(number, prompt), version)

    def replace_unfit(self, version: int, lag: int, restart: Start) -> None:
        """Starts groups again that an earlier start of the run has left, if their tokens are too old or too new for the
        step that begins with weights of this version. Raises the error of a group that has failed."""
        for number, begun in self.open.items():
            if begun.group.done() and not is_of_age(group := begun.group.result(), version, lag):
                self.open[number] = Begun(restart(number, group.prompt), version)

    def take(self, numbers: Sequence[int]) -> list[Future[Group]]:
        """Returns this leader's groups among those of `numbers`, which were admitted."""
        return [self.open.pop(number).group for number in numbers if number in self.open]

    @property
    def unfinished(self) -> list[Future[Group]]:
        return [begun.group for begun in self.open.values() if not begun.group.done()]

    def facts(self) -> list[Fact]:
        """Raises the error of a group that has failed."""
        return [Fact(number, begun.group.done(), begun.oldest) for number, begun in self.open.items()]
