"""Plans one rollout batch: the optimizer step, data-parallel replica and micro-batch of each sample.

Pure Python, with the same result on every rank. The groups alone decide what an optimizer step trains on. The layout
only decides how the work is divided, so losses, gradients and metrics do not change with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from megatron_rl.data.bin_packing import fewest_bins, pack_bins
from megatron_rl.data.replica_balance import Division, deal, exchange, near_home
from megatron_rl.errors import UserError

TOKEN_COST = 10_000
"""Cost of a token without attention, relative to its attention to one other token.

About right for experts with 3B active parameters and 4,096 wide attention heads: a layer takes 110 MFLOP a token, and
8 kFLOP for each token of the sequence. A dense model of width 4,096 has about 50,000.
"""


ENOUGH = 1.01
"""Micro-batches over their lower bound that are not worth the time of better packing."""


class ScheduleError(UserError):
    """The batch cannot be divided as the configuration asks."""


@dataclass(frozen=True)
class SampleSize:
    """The part of a sample that the plan needs."""

    index: int  # global, group-major
    group: int
    tokens: int  # prompt and response
    response_tokens: int  # masked in; may be 0

    @property
    def cost(self) -> int:
        return self.tokens * (TOKEN_COST + self.tokens)


@dataclass(frozen=True)
class Denominators:
    """Denominators of one global mini-batch, over all its micro-batches and data-parallel replicas.

    They make the gradient independent of how the mini-batch is divided. They are 0 if every token is masked out. Raises
    ValueError for numbers that no mini-batch can have.
    """

    tokens: int
    """Masked-in tokens."""
    sequences: int
    """Sequences with a masked-in token. A masked-out sequence is in neither numerator nor denominator."""
    prompt_tokens: Mapping[int, int] = field(default_factory=dict)
    """Masked-in tokens of all responses to each prompt, by the number of its group; only `prompt-mean` reads it."""

    @property
    def prompts(self) -> int:
        """Prompts with a masked-in token."""
        return sum(tokens > 0 for tokens in self.prompt_tokens.values())

    def __post_init__(self) -> None:
        if self.tokens < self.sequences or self.sequences < 0:
            raise ValueError(f"denominators: {self.sequences} sequences cannot share {self.tokens} masked-in tokens")
        of_prompts = sum(self.prompt_tokens.values())
        if self.prompt_tokens and of_prompts != self.tokens:
            raise ValueError(
                f"denominators: the prompts have {of_prompts} masked-in tokens, but the mini-batch has {self.tokens}"
            )


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. micro_batches[dp][k] holds sample indexes; all replicas have equally many micro-batches.

    A micro-batch may be empty: its replica takes part in the schedule and the all-to-alls, and adds nothing.
    """

    mini_batch: int
    denominators: Denominators
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Schedule:
    steps: tuple[StepPlan, ...]


@dataclass(frozen=True)
class _Budget:
    """Token budget of a micro-batch, which is full if it has as many multiples of `align` as the capacity."""

    tokens: int
    align: int

    @property
    def capacity(self) -> int:
        return max(1, self.tokens // self.align)

    def multiples(self, sample: SampleSize) -> int:
        return -(-sample.tokens // self.align)

    def size(self, sample: SampleSize) -> int:
        """What the sample takes of the capacity. A sample above the budget takes all of it, so it is alone."""
        return min(self.multiples(sample), self.capacity)


def plan(
    sizes: Sequence[SampleSize],
    *,
    mini_batches: int,
    dp: int,
    max_tokens: int,
    micro_batch_multiple: int = 1,
    align: int = 1,
    home: Sequence[int] | None = None,
) -> Schedule:
    """Deals groups to mini-batches in equal consecutive blocks, and a mini-batch's samples to replicas by cost.

    All replicas make equally many micro-batches, as few as are found; some may be empty.

    max_tokens: budget of a micro-batch. A sample counts as its length rounded up to `align`; a sample above the budget
    gets its own micro-batch. micro_batch_multiple: divides the number of micro-batches. home: the replica that holds
    each of `sizes`; a sample stays there if the balance allows it.

    Raises ScheduleError if groups do not divide into mini-batches, and ValueError if an index occurs twice.
    """
    if len({size.index for size in sizes}) < len(sizes):
        raise ValueError("two samples have the same index; a group was fetched twice, or numbered wrongly")
    groups = sorted({size.group for size in sizes})
    if not groups or len(groups) % mini_batches:
        raise ScheduleError(
            f"{len(groups)} groups do not divide into train.mini_batches = {mini_batches}; a group is never split"
        )
    per_step = len(groups) // mini_batches
    step_of = {group: position // per_step for position, group in enumerate(groups)}
    homes = {} if home is None else {s.index: h for s, h in zip(sizes, home, strict=True)}
    budget = _Budget(max_tokens, align)
    members: list[list[SampleSize]] = [[] for _ in range(mini_batches)]
    for size in sizes:
        members[step_of[size.group]].append(size)
    return Schedule(
        tuple(_step(number, each, dp, budget, micro_batch_multiple, homes) for number, each in enumerate(members))
    )


def _step(
    number: int, members: Sequence[SampleSize], dp: int, budget: _Budget, multiple: int, homes: Mapping[int, int]
) -> StepPlan:
    denominators = Denominators(
        tokens=sum(s.response_tokens for s in members),
        sequences=sum(s.response_tokens > 0 for s in members),
        prompt_tokens=_tokens_by_group(members),
    )
    members = sorted(members, key=lambda sample: sample.index)
    replicas = _divide(members, dp, budget, multiple, homes)
    return StepPlan(number, denominators, tuple(_cut(replica, budget) for replica in replicas))


def _tokens_by_group(members: Sequence[SampleSize]) -> dict[int, int]:
    tokens: dict[int, int] = {}
    for sample in members:
        tokens[sample.group] = tokens.get(sample.group, 0) + sample.response_tokens
    return tokens


def _divide(
    members: Sequence[SampleSize], dp: int, budget: _Budget, multiple: int, homes: Mapping[int, int]
) -> list[list[list[SampleSize]]]:
    """Returns [dp][count] micro-batches within the budget: first as few as are found, then as balanced."""
    sizes = [budget.size(sample) for sample in members]
    least = _count(fewest_bins(sizes, budget.capacity), dp, multiple)
    enough = int(least * ENOUGH) // multiple * multiple
    packed = pack_bins(sizes, budget.capacity, enough * dp)
    division = Division(
        loads=np.array([[sample.tokens, sample.cost] for sample in members]),
        sizes=np.array(sizes),
        homes=np.array([homes.get(sample.index, -1) for sample in members]),
        dp=dp,
        count=_count(len(packed), dp, multiple),
        capacity=budget.capacity,
    )
    start = near_home(division)
    bins = exchange(division, deal(division, packed) if start is None else start)
    replicas: list[list[list[SampleSize]]] = [[[] for _ in range(division.count)] for _ in range(dp)]
    for sample, place in zip(members, bins.tolist(), strict=True):
        replicas[place // division.count][place % division.count].append(sample)
    return replicas


def _count(micro_batches: int, dp: int, multiple: int) -> int:
    """Number of micro-batches of a replica. All have equally many, since schedules and all-to-alls run in lockstep."""
    return -(-micro_batches // (dp * multiple)) * multiple


def _cut(parts: Sequence[list[SampleSize]], budget: _Budget) -> tuple[tuple[int, ...], ...]:
    """Returns a replica's micro-batches, made even and fullest first, so that similar ones meet in an all-to-all."""

    def load(part: Sequence[SampleSize]) -> int:
        return sum(map(budget.multiples, part))

    even = _evenly([sample for part in parts for sample in part], len(parts), budget)
    if any(sum(map(budget.size, part)) > budget.capacity for part in even):
        even = _without_empty(parts, load)
    even.sort(key=lambda part: (-load(part), part[0].index if part else 0))
    return tuple(tuple(sorted(sample.index for sample in part)) for part in even)


def _without_empty(
    parts: Sequence[list[SampleSize]], load: Callable[[Sequence[SampleSize]], int]
) -> list[list[SampleSize]]:
    """Halves the fullest micro-batches that have several samples, until none is empty or all have one sample."""
    done: list[list[SampleSize]] = [part for part in parts if len(part) == 1]
    several = [(-load(part), number, part) for number, part in enumerate(parts) if len(part) > 1]
    heapify(several)
    for number in range(len(parts) - len(done) - len(several)):
        if not several:
            return done + [[] for _ in range(len(parts) - len(done))]
        *_, fullest = heappop(several)
        for half in (0, 1):
            part = fullest[half::2]
            if len(part) == 1:
                done.append(part)
            else:
                heappush(several, (-load(part), len(parts) + 2 * number + half, part))
    return done + [part for *_, part in several]


def _evenly(samples: Sequence[SampleSize], count: int, budget: _Budget) -> list[list[SampleSize]]:
    """Fills `count` micro-batches, longest sample first into the emptiest; one may exceed the budget."""
    parts: list[list[SampleSize]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]  # a heap
    for sample in sorted(samples, key=lambda s: (-s.tokens, s.index)):
        load, number = emptiest[0]
        parts[number].append(sample)
        heapreplace(emptiest, (load + budget.multiples(sample), number))
    return parts
