"""One leader's groups in the order of the run's prompts, some of them started ahead of the step that trains on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from megatron_rl.data.prompts import PromptCursor, PromptDataset, take_indexes
from megatron_rl.data.sample import Group, Prompt

Start = Callable[[int, Prompt], "Future[Group]"]
"""Begins to sample and judge a group. The number of its prompt counts from the beginning of the run, over all leaders
and epochs."""


class Flow:
    """A step takes groups by the number of their prompts, not by when they are done. So no step prefers prompts with
    short responses, and a resume takes the same prompts."""

    def __init__(self, dataset: PromptDataset, start: Start, share: int, of: int) -> None:
        """This leader has number `share` of every `of` prompts."""
        self._dataset = dataset
        self._start = start
        self._share = share
        self._of = of
        self._open: dict[int, Future[Group]] = {}  # by number
        self._ahead: PromptCursor | None = None  # behind all that were started

    def number(self, cursor: PromptCursor) -> int:
        """Returns the number of the next prompt."""
        return cursor.epoch * len(self._dataset) + cursor.position

    def admit(self, cursor: PromptCursor, count: int) -> None:
        """Starts what is not started of the next `count` prompts."""
        if self._ahead is None:
            self._ahead = cursor
        first = self.number(self._ahead)
        if (missing := self.number(cursor) + count - first) <= 0:
            return
        prompts, self._ahead = self._dataset.take(self._ahead, missing)
        for number, prompt in enumerate(prompts, first):
            if number % self._of == self._share:
                self._open[number] = self._start(number, prompt)

    def take(self, cursor: PromptCursor, count: int) -> tuple[Sequence[Future[Group]], PromptCursor]:
        """Returns this leader's groups of the next `count` prompts, which were admitted, and the cursor after them."""
        numbers = range(self.number(cursor), self.number(cursor) + count)
        taken = [self._open.pop(number) for number in numbers if number in self._open]
        return taken, take_indexes(len(self._dataset), cursor, count)[1]
