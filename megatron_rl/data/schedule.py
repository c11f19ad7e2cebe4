"""The global plan of one rollout batch: which sample is trained on in which optimizer step, on which data-parallel
replica and in which micro-batch. Pure Python, the same on every rank.

What an optimizer step trains on depends on the groups alone. The layout only decides how that work is cut up, so losses,
gradients and metrics do not change with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ATTENTION_COST = 1e-4
"""Cost of a token's attention to another, in units of its cost elsewhere: about that of a 4096-wide model."""


@dataclass(frozen=True)
class SampleSize:
    """All that the plan needs to know of a sample."""

    index: int  # global, group-major
    group: int
    tokens: int  # prompt and response
    response_tokens: int  # masked in

    @property
    def cost(self) -> float:
        return self.tokens * (1 + ATTENTION_COST * self.tokens)


@dataclass(frozen=True)
class Denominators:
    """Of one global mini-batch, over all its micro-batches and data-parallel replicas.

    They are what makes the gradient independent of how the mini-batch is cut up. Both may be 0, where all is masked out.
    Raises ValueError for numbers that no mini-batch has.
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
    """One optimizer step: micro_batches[dp][k] is a tuple of sample indexes; every replica has as many."""

    mini_batch: int
    denominators: Denominators
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Schedule:
    steps: tuple[StepPlan, ...]


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
    micro-batch of its own. micro_batch_multiple: what the number of micro-batches must divide by. home: the replica that
    holds each sample, kept where balance allows.

    Raises ValueError when groups do not divide into mini-batches, or samples cannot fill all replicas.
    """
    groups = sorted({size.group for size in sizes})
    if not groups or len(groups) % mini_batches:
        raise ValueError(
            f"{len(groups)} groups do not divide into train.mini_batches = {mini_batches}; a group is never split"
        )
    per_step = len(groups) // mini_batches
    step_of = {group: position // per_step for position, group in enumerate(groups)}
    homes = dict(zip((s.index for s in sizes), home or [0] * len(sizes), strict=True))
    steps = []
    for number in range(mini_batches):
        members = [size for size in sizes if step_of[size.group] == number]
        replicas = _balance(members, dp, homes if home is not None else None)
        steps.append(
            StepPlan(
                mini_batch=number,
                denominators=Denominators(
                    tokens=sum(s.response_tokens for s in members),
                    sequences=sum(s.response_tokens > 0 for s in members),
                ),
                micro_batches=_micro_batches(replicas, max_tokens, micro_batch_multiple, align),
            )
        )
    return Schedule(tuple(steps))


def _balance(members: Sequence[SampleSize], dp: int, homes: dict[int, int] | None) -> list[list[SampleSize]]:
    """Longest first to the least loaded replica, or to the sample's home while that is not over its fair share."""
    share = sum(s.cost for s in members) / dp
    replicas: list[list[SampleSize]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for sample in sorted(members, key=lambda s: (-s.cost, s.index)):
        target = min(range(dp), key=lambda r: (loads[r], r))
        if homes is not None:
            at_home = homes[sample.index]
            if loads[at_home] + sample.cost <= share + max(0.01 * share, sample.cost / 2):
                target = at_home
        replicas[target].append(sample)
        loads[target] += sample.cost
    return replicas


def _micro_batches(
    replicas: Sequence[Sequence[SampleSize]], max_tokens: int, multiple: int, align: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    def padded(sample: SampleSize) -> int:
        return -(-sample.tokens // align) * align

    needed = 1
    for samples in replicas:
        needed = max(needed, len(_first_fit(samples, padded, max_tokens)))
    count = -(-needed // multiple) * multiple
    fewest = min(len(samples) for samples in replicas)
    if fewest < count:
        raise ValueError(
            f"a mini-batch leaves one of {len(replicas)} data-parallel replicas {fewest} samples for {count} micro-batches; "
            "use fewer replicas or mini-batches, more samples, or a larger engine.max_tokens_per_micro_batch"
        )
    return tuple(
        tuple(tuple(sorted(s.index for s in part)) for part in _spread(samples, padded, max_tokens, count))
        for samples in replicas
    )


def _first_fit(samples, padded, max_tokens):  # type: ignore[no-untyped-def]
    """First-fit decreasing: how few micro-batches hold the samples."""
    parts: list[list[SampleSize]] = []
    loads: list[int] = []
    for sample in sorted(samples, key=lambda s: (-padded(s), s.index)):
        for k, load in enumerate(loads):
            if load + padded(sample) <= max_tokens:
                parts[k].append(sample)
                loads[k] += padded(sample)
                break
        else:
            parts.append([sample])
            loads.append(padded(sample))
    return parts


def _spread(samples, padded, max_tokens, count):  # type: ignore[no-untyped-def]
    """`count` micro-batches within the budget, none empty: those of first fit, the fullest split until there are enough."""
    parts = _first_fit(samples, padded, max_tokens)
    while len(parts) < count:
        splittable = [p for p in parts if len(p) > 1]
        fullest = max(splittable, key=lambda p: (sum(map(padded, p)), len(p)))
        parts.remove(fullest)
        parts += [fullest[0::2], fullest[1::2]]
    return parts
