"""The global plan of one rollout batch: which sample is trained on in which optimizer step, on which data-parallel
replica and in which micro-batch. Pure Python, the same on every rank.

What an optimizer step trains on depends on the groups alone. The layout only decides how that work is cut up, so
losses, gradients and metrics do not change with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.errors import UserError

ATTENTION_COST = 1e-4
"""Cost of a token's attention to another, in units of its cost elsewhere: about that of a 4096-wide model."""

MAX_BEST_FILL = 512
"""Samples of a mini-batch that are packed by best fill too: it takes milliseconds then, and minutes for ten thousand,
of which first-fit decreasing leaves no room to speak of."""


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
    """One optimizer step. micro_batches[dp][k] is a tuple of sample indexes; every replica has as many micro-batches.

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
    """Of a micro-batch."""

    tokens: int
    align: int

    def tokens_of(self, sample: SampleSize) -> int:
        return -(-sample.tokens // self.align) * self.align

    def total(self, samples: Sequence[SampleSize]) -> int:
        return sum(map(self.tokens_of, samples))

    def holds(self, samples: Sequence[SampleSize]) -> bool:
        return len(samples) <= 1 or self.total(samples) <= self.tokens

    def fewest(self, samples: Sequence[SampleSize]) -> int:
        """A lower bound of the micro-batches that hold the samples."""
        sizes = [self.tokens_of(sample) for sample in samples]
        long = sum(size > self.tokens for size in sizes)
        halves = sum(size > self.tokens / 2 for size in sizes)
        fluid = -(-sum(size for size in sizes if size <= self.tokens) // self.tokens)
        return max(halves, long + fluid)


@dataclass
class _Bins:
    """Micro-batches filled by first fit, in the order in which samples are added."""

    budget: _Budget
    parts: list[list[SampleSize]] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)

    def add(self, sample: SampleSize, limit: int | None = None) -> bool:
        """Whether there is room, in at most `limit` micro-batches; the sample is then added."""
        tokens, budget = self.budget.tokens_of(sample), self.budget.tokens
        part = next((k for k, load in enumerate(self.loads) if load + tokens <= budget), len(self.parts))
        if part == len(self.parts):
            if part == limit:
                return False
            self.parts.append([])
            self.loads.append(0)
        self.parts[part].append(sample)
        self.loads[part] += tokens
        return True


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

    Each replica makes as many micro-batches as any: the fewest that are found for all of them together, some of which
    may be empty.

    max_tokens: budget of a micro-batch, each sample counted as its length rounded up to `align`; a longer sample gets a
    micro-batch of its own. micro_batch_multiple: what the number of micro-batches must divide by. home: the replica
    that holds each of `sizes`, kept where balance allows.

    Raises ScheduleError when groups do not divide into mini-batches; ValueError when an index is there twice.
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
    )
    replicas = _balance(members, dp, budget, homes)
    assert replicas is not None
    count = _count(replicas, multiple)
    if count > _round_up(-(-budget.fewest(members) // dp), multiple):
        together = _first_fit(members, budget)
        if len(members) <= MAX_BEST_FILL:  # neither is always the better
            together = min(together, _best_fill(members, budget), key=lambda bins: len(bins.parts))
        fewest = _round_up(-(-len(together.parts) // dp), multiple)
        if fewest < count:
            count = fewest
            replicas = _balance(members, dp, budget, homes, count) or _deal(together, dp, count)
    return StepPlan(number, denominators, tuple(_cut(replica, count) for replica in replicas))


def _balance(
    members: Sequence[SampleSize], dp: int, budget: _Budget, homes: Mapping[int, int], limit: int | None = None
) -> list[_Bins] | None:
    """Longest first, to the least loaded replica, or to the sample's home while that would exceed its fair share by no
    more than half the sample. None if this takes more than `limit` micro-batches a replica."""
    share = sum(s.cost for s in members) / dp
    replicas = [_Bins(budget) for _ in range(dp)]
    loads = [0.0] * dp
    for sample in _longest_first(members):
        order = sorted(range(dp), key=lambda replica: (loads[replica], replica))
        at_home = homes.get(sample.index, order[0])
        if loads[at_home] + sample.cost / 2 <= share:
            order.insert(0, at_home)
        target = next((replica for replica in order if replicas[replica].add(sample, limit)), None)
        if target is None:
            return None
        loads[target] += sample.cost
    return replicas


def _deal(together: _Bins, dp: int, count: int) -> list[_Bins]:
    """Whole micro-batches to replicas, the costliest first to the least loaded that has fewer than `count`."""
    replicas = [_Bins(together.budget) for _ in range(dp)]
    loads = [0.0] * dp
    costs = [sum(sample.cost for sample in part) for part in together.parts]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        target = min((r for r in range(dp) if len(replicas[r].parts) < count), key=lambda r: (loads[r], r))
        replicas[target].parts.append(together.parts[number])
        loads[target] += costs[number]
    return replicas


def _count(replicas: Sequence[_Bins], multiple: int) -> int:
    """Replicas are in lockstep through their schedules and all-to-alls: all make as many as the fullest needs."""
    return _round_up(max(len(replica.parts) for replica in replicas), multiple)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _cut(replica: _Bins, count: int) -> tuple[tuple[int, ...], ...]:
    """Its `count` micro-batches, the fullest first, so that those that meet in an all-to-all are alike."""
    budget = replica.budget
    parts = _evenly([sample for part in replica.parts for sample in part], count, budget)
    if not all(map(budget.holds, parts)):
        parts = list(replica.parts)
        while len(parts) < count and any(len(part) > 1 for part in parts):
            fullest = max((part for part in parts if len(part) > 1), key=budget.total)
            parts.remove(fullest)
            parts += [fullest[0::2], fullest[1::2]]
        parts += [[] for _ in range(count - len(parts))]
    parts.sort(key=lambda part: (-budget.total(part), part[0].index if part else 0))
    return tuple(tuple(sorted(sample.index for sample in part)) for part in parts)


def _evenly(samples: Sequence[SampleSize], count: int, budget: _Budget) -> list[list[SampleSize]]:
    """Longest first to the emptiest of `count`; one may exceed the budget."""
    parts: list[list[SampleSize]] = [[] for _ in range(count)]
    loads = [0] * count
    for sample in _longest_first(samples):
        emptiest = loads.index(min(loads))
        parts[emptiest].append(sample)
        loads[emptiest] += budget.tokens_of(sample)
    return parts


def _first_fit(samples: Sequence[SampleSize], budget: _Budget) -> _Bins:
    """First-fit decreasing: about as few micro-batches as hold the samples."""
    bins = _Bins(budget)
    for sample in _longest_first(samples):
        bins.add(sample)
    return bins


def _best_fill(samples: Sequence[SampleSize], budget: _Budget) -> _Bins:
    """One micro-batch after another: the longest sample that is left, and of the others what fills it up best."""
    bins = _Bins(budget)
    left = _longest_first(samples)[::-1]
    while left:
        part = [left.pop()]
        room = max(budget.tokens - budget.tokens_of(part[0]), 0)
        # Bit n of reachable[k] is set if some of the k shortest have n tokens.
        reachable, mask = [1], (1 << room + 1) - 1
        for sample in left:
            reachable.append(reachable[-1] | reachable[-1] << budget.tokens_of(sample) & mask)
        wanted = reachable[-1].bit_length() - 1
        for k in range(len(left), 0, -1):
            rest = wanted - budget.tokens_of(left[k - 1])
            if rest >= 0 and reachable[k - 1] >> rest & 1:
                part.append(left.pop(k - 1))
                wanted = rest
        bins.parts.append(part)
    return bins


def _longest_first(samples: Sequence[SampleSize]) -> list[SampleSize]:
    return sorted(samples, key=lambda s: (-s.tokens, s.index))
