"""Plans one rollout batch: the optimizer step, data-parallel replica and micro-batch of each sample.

Pure Python, with the same result on every rank. The groups alone decide what an optimizer step trains on. The layout
only decides how the work is divided, so losses, gradients and metrics do not change with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.errors import UserError

ATTENTION_COST = 1e-4
"""Cost of one token's attention to one other, relative to the token's other cost; about right for a width of 4096."""

MAX_BEST_FILL = 512
"""Most samples of a mini-batch for which best fill is tried too.

Best fill takes milliseconds for this many samples, and minutes for ten thousand. With so many, first-fit decreasing
leaves hardly any room unused.
"""


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
    def cost(self) -> float:
        return self.tokens * (1 + ATTENTION_COST * self.tokens)


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
    """Token budget of a micro-batch."""

    tokens: int
    align: int

    def tokens_of(self, sample: SampleSize) -> int:
        return -(-sample.tokens // self.align) * self.align

    def total(self, samples: Sequence[SampleSize]) -> int:
        return sum(map(self.tokens_of, samples))

    def holds(self, samples: Sequence[SampleSize]) -> bool:
        return len(samples) <= 1 or self.total(samples) <= self.tokens

    def fewest(self, samples: Sequence[SampleSize]) -> int:
        """Lower bound of the number of micro-batches that hold the samples."""
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
        """Adds the sample if at most `limit` micro-batches have room for it; returns whether it did."""
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
    replicas = _balance(members, dp, budget, homes)
    assert replicas is not None
    count = _count(replicas, multiple)
    if count > _round_up(-(-budget.fewest(members) // dp), multiple):
        together = _first_fit(members, budget)
        if len(members) <= MAX_BEST_FILL:  # neither method is always better
            together = min(together, _best_fill(members, budget), key=lambda bins: len(bins.parts))
        fewest = _round_up(-(-len(together.parts) // dp), multiple)
        if fewest < count:
            count = fewest
            replicas = _balance(members, dp, budget, homes, count) or _deal(together, dp, count)
    return StepPlan(number, denominators, tuple(_cut(replica, count) for replica in replicas))


def _tokens_by_group(members: Sequence[SampleSize]) -> dict[int, int]:
    tokens: dict[int, int] = {}
    for sample in members:
        tokens[sample.group] = tokens.get(sample.group, 0) + sample.response_tokens
    return tokens


def _balance(
    members: Sequence[SampleSize], dp: int, budget: _Budget, homes: Mapping[int, int], limit: int | None = None
) -> list[_Bins] | None:
    """Gives samples to replicas, longest first; None if a replica would need more than `limit` micro-batches.

    A sample goes to its home if that exceeds the home's fair share by at most half the sample, else to the least loaded
    replica.
    """
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
    """Gives whole micro-batches to replicas, costliest first: to the least loaded that has fewer than `count`."""
    replicas = [_Bins(together.budget) for _ in range(dp)]
    loads = [0.0] * dp
    costs = [sum(sample.cost for sample in part) for part in together.parts]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        target = min((r for r in range(dp) if len(replicas[r].parts) < count), key=lambda r: (loads[r], r))
        replicas[target].parts.append(together.parts[number])
        loads[target] += costs[number]
    return replicas


def _count(replicas: Sequence[_Bins], multiple: int) -> int:
    """Number of micro-batches per replica: what the fullest needs, since schedules and all-to-alls run in lockstep."""
    return _round_up(max(len(replica.parts) for replica in replicas), multiple)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _cut(replica: _Bins, count: int) -> tuple[tuple[int, ...], ...]:
    """A replica's `count` micro-batches, fullest first, so that similar ones meet in an all-to-all."""
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
    """Fills `count` micro-batches, longest sample first into the emptiest; one may exceed the budget."""
    parts: list[list[SampleSize]] = [[] for _ in range(count)]
    loads = [0] * count
    for sample in _longest_first(samples):
        emptiest = loads.index(min(loads))
        parts[emptiest].append(sample)
        loads[emptiest] += budget.tokens_of(sample)
    return parts


def _first_fit(samples: Sequence[SampleSize], budget: _Budget) -> _Bins:
    """Fills micro-batches by first-fit decreasing: nearly as few as can hold the samples."""
    bins = _Bins(budget)
    for sample in _longest_first(samples):
        bins.add(sample)
    return bins


def _best_fill(samples: Sequence[SampleSize], budget: _Budget) -> _Bins:
    """Fills one micro-batch at a time: the longest remaining sample, and the others that fill it best."""
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
