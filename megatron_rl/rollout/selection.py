"""Chooses the groups that a step takes while others are still sampled. Pure functions of facts that all ranks know.

A group may be trained on until its oldest token is `lag` weight versions behind. So of the groups that are open, at
most k steps' worth may be due within the next k steps, or some would become too old before a step had room for them.
A step whose choice would break this waits for the groups that are due. Groups of long responses are so trained on, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """What ranks tell one another about a group that no step has taken."""

    number: int  # of its prompt
    done: bool
    oldest: int  # weight version of its oldest token; of the weights when it was started, until it is done


def choose(facts: Sequence[Fact], count: int, *, step: int, lag: int, prompts: int) -> list[Fact] | None:
    """Returns `count` groups that are done, the oldest first, and those that are due among them; None if there are
    not as many. pi_old is weight version `step`, and each later step takes at least `prompts` groups."""
    done = sorted((fact for fact in facts if fact.done), key=lambda fact: (fact.oldest, fact.number))
    chosen = done[:count]
    if len(chosen) < count or not leaves_room(facts, chosen, step=step, lag=lag, prompts=prompts):
        return None
    return sorted(chosen, key=lambda fact: fact.number)


def leaves_room(facts: Sequence[Fact], chosen: Sequence[Fact], *, step: int, lag: int, prompts: int) -> bool:
    """Tells whether the steps after this one have room for the groups that become due, if it takes those `chosen`."""
    for later in range(lag):
        last = step + later - lag  # the version that no step after `step + later` may train on
        due = sum(fact.oldest <= last for fact in facts)
        if sum(fact.oldest <= last for fact in chosen) < min(len(chosen), due - later * prompts):
            return False
    return True


def choose_again(facts: Sequence[Fact], numbers: Collection[int]) -> list[Fact] | None:
    """Returns the groups that a step has taken before it was interrupted; None until all of them are done."""
    chosen = [fact for fact in facts if fact.done and fact.number in numbers]
    return sorted(chosen, key=lambda fact: fact.number) if len(chosen) == len(numbers) else None


def untaken(first: int, taken: Collection[int], count: int) -> list[int]:
    """Returns the numbers of the next `count` prompts from `first` on that are not among those `taken`."""
    numbers: list[int] = []
    taken = frozenset(taken)
    while len(numbers) < count:
        if first not in taken:
            numbers.append(first)
        first += 1
    return numbers


def after_taking(first: int, taken: Collection[int], chosen: Collection[int]) -> tuple[int, tuple[int, ...]]:
    """Returns the first number that is not taken once `chosen` are, and the numbers after it that are."""
    all_taken = {*taken, *chosen}
    while first in all_taken:
        first += 1
    return first, tuple(sorted(number for number in all_taken if number > first))


def times(count: int, factor: float) -> int:
    """Returns `count` times `factor`, rounded up."""
    return math.ceil(round(count * factor, 6))  # 10 * 1.1 is above 11 in floating point
