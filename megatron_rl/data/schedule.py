"""The global plan of one rollout batch: which sample is trained on in which optimizer step, on which data-parallel
replica and in which micro-batch. Pure Python, the same on every rank.

What an optimizer step trains on depends on the groups alone. The layout only decides how that work is cut up, so
losses, gradients and metrics do not change with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.errors import UserError

ATTENTION_COST = 1e-4
"""Cost of a token's attention to another, in units of its cost elsewhere: about that of a 4096-wide model."""


class ScheduleError(UserError):
    """A batch that cannot be cut up as the configuration asks."""


@dataclass(frozen=True)
class SampleSize:
    """All that the plan needs to know of a sample."""

    index: int  # global, group-major
    group: int
    tokens: int  # prompt and response
    response_tokens: int  # masked in; may be 0

    @property
    def cost(self) -> float:
        return self.tokens * (1 + ATTENTION_COST * self.tokens)


@dataclass(frozen=True)
class Denominators:
    """Of one global mini-batch, over all its micro-batches and data-parallel replicas.

    They are what makes the gradient independent of how the mini-batch is cut up. Both may be 0, where all is masked
    out. Raises ValueError for numbers that no mini-batch has.
    """

    tokens: int
    """Masked-in tokens."""
    sequences: int
    """Sequences with a masked-in token: one that is masked out leaves numerator and denominator."""

    def __post_init__(self) -> None:
        if self.tokens < self.sequences or self.sequences < 0:
            raise ValueError(f"denominators: {self.sequences} sequences cannot share {self.tokens} masked-in tokens")


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. micro_batches[dp][k] is a tuple of sample indexes; every replica has as many, none empty."""

    mini_batch: int
    denominators: Denominators
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Schedule:
    steps: tuple[StepPlan, ...]


@dataclass(frozen=True)
class _Budget:
    """Of a micro-batch."""

    tokens: int
    align: int

    def tokens_of(self, sample: SampleSize) -> int:
        return -(-sample.tokens // self.align) * self.align

    def holds(self, samples: Sequence[SampleSize]) -> bool:
        return len(samples) == 1 or sum(map(self.tokens_of, samples)) <= self.tokens


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
    """Groups go to mini-batches in equal consecutive blocks; within one, samples to replicas by balanced cost.

    max_tokens: budget of a micro-batch, each sample counted as its length rounded up to `align`; a longer sample gets a
    micro-batch of its own. micro_batch_multiple: what the number of micro-batches must divide by. home: the replica
    that holds each of `sizes`, kept where balance allows.

    Raises ScheduleError when groups do not divide into mini-batches, or a mini-batch has too few samples to give each
    replica as many micro-batches as its tokens need; ValueError when an index is there twice.
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
    steps = []
    for number in range(mini_batches):
        members = [size for size in sizes if step_of[size.group] == number]
        replicas = _balance(members, dp, homes)
        count = _even_counts(replicas, budget, micro_batch_multiple)
        denominators = Denominators(
            tokens=sum(s.response_tokens for s in members),
            sequences=sum(s.response_tokens > 0 for s in members),
        )
        steps.append(StepPlan(number, denominators, tuple(_cut(r, count, budget) for r in replicas)))
    return Schedule(tuple(steps))


def _balance(members: Sequence[SampleSize], dp: int, homes: Mapping[int, int]) -> list[list[SampleSize]]:
    """Longest first, to the least loaded replica, or to the sample's home while that would exceed its fair share by no
    more than half the sample."""
    share = sum(s.cost for s in members) / dp
    replicas: list[list[SampleSize]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for sample in _longest_first(members):
        target = min(range(dp), key=lambda replica: (loads[replica], replica))
        at_home = homes.get(sample.index, target)
        if loads[at_home] + sample.cost / 2 <= share:
            target = at_home
        replicas[target].append(sample)
        loads[target] += sample.cost
    return replicas


def _even_counts(replicas: list[list[SampleSize]], budget: _Budget, multiple: int) -> int:
    """How many micro-batches every replica makes: as many as the fullest needs, and not more than any has samples.

    Replicas are in lockstep through their schedules and all-to-alls. One with a few long samples gets short ones from
    the others. Raises ScheduleError when there are too few samples in all.
    """
    samples = sum(map(len, replicas))
    count = 0
    while True:
        needed = max(len(_first_fit(replica, budget)) for replica in replicas)
        count = max(count, -(-needed // multiple) * multiple)
        if samples < count * len(replicas):
            raise ScheduleError(
                f"a mini-batch has {samples} samples, but {len(replicas)} data-parallel replicas make {count} "
                "micro-batches each; use fewer replicas, mini-batches or pipeline stages, more samples, or a larger "
                "engine.max_tokens_per_micro_batch"
            )
        poorest = min(replicas, key=len)
        if len(poorest) >= count:
            return count
        richest = max(replicas, key=len)
        shortest = _longest_first(richest)[-1]
        richest.remove(shortest)
        poorest.append(shortest)


def _cut(samples: Sequence[SampleSize], count: int, budget: _Budget) -> tuple[tuple[int, ...], ...]:
    """One replica's micro-batches, the fullest first, so that those that meet in an all-to-all are alike."""
    parts = _evenly(samples, count, budget)
    if not all(map(budget.holds, parts)):
        parts = _first_fit(samples, budget)
        while len(parts) < count:
            fullest = max((part for part in parts if len(part) > 1), key=lambda p: sum(map(budget.tokens_of, p)))
            parts.remove(fullest)
            parts += [fullest[0::2], fullest[1::2]]
    parts.sort(key=lambda part: (-sum(map(budget.tokens_of, part)), part[0].index))
    return tuple(tuple(sorted(sample.index for sample in part)) for part in parts)


def _evenly(samples: Sequence[SampleSize], count: int, budget: _Budget) -> list[list[SampleSize]]:
    """Longest first to the emptiest of `count`; none stays empty, but one may exceed the budget."""
    parts: list[list[SampleSize]] = [[] for _ in range(count)]
    loads = [0] * count
    for sample in _longest_first(samples):
        emptiest = loads.index(min(loads))
        parts[emptiest].append(sample)
        loads[emptiest] += budget.tokens_of(sample)
    return parts


def _first_fit(samples: Sequence[SampleSize], budget: _Budget) -> list[list[SampleSize]]:
    """First-fit decreasing: about as few micro-batches as hold the samples."""
    parts: list[list[SampleSize]] = []
    loads: list[int] = []
    for sample in _longest_first(samples):
        tokens = budget.tokens_of(sample)
        part = next((k for k, load in enumerate(loads) if load + tokens <= budget.tokens), None)
        if part is None:
            parts.append([sample])
            loads.append(tokens)
        else:
            parts[part].append(sample)
            loads[part] += tokens
    return parts


def _longest_first(samples: Sequence[SampleSize]) -> list[SampleSize]:
    return sorted(samples, key=lambda s: (-s.tokens, s.index))
