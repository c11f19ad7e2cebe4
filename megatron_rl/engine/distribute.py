"""Turns each leader's own samples into the packed micro-batches of every rank.

Leaders exchange sizes only; every rank then makes the same plan. Samples that the plan moves to another data-parallel
replica travel between leaders, and each leader hands its replica what that replica trains on. Routing traces take the
same way, but each rank gets its own slice only (routing/exchange.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch, pack_all
from megatron_rl.data.sample import Sample
from megatron_rl.data.schedule import Denominators, SampleSize, plan
from megatron_rl.data.store import decode_samples, encode_samples
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.engine.top_exchange import TopExchange
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes
from megatron_rl.ranks.place import Place
from megatron_rl.routing.exchange import RouteExchange
from megatron_rl.routing.slicing import RankRoutes


@dataclass(frozen=True)
class TrainSample:
    """A sample with its place in the rollout batch and its advantage."""

    index: int  # global, group-major: the same under every layout
    group: int
    sample: Sample
    advantage: float


@dataclass(frozen=True)
class Outcome:
    """A packed sequence's sample number, group and reward."""

    index: int  # as TrainSample's
    group: int
    reward: float
    lost: bool = False  # it has no reward; see Verdict


@dataclass(frozen=True)
class MiniBatch:
    """This rank's part of what one optimizer step trains on."""

    index: int
    micro_batches: tuple[PackedBatch, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]  # of each micro-batch's sequences
    denominators: Denominators  # of all data-parallel replicas together
    routes: tuple[RankRoutes, ...] | None = None  # the rollout's, one for each micro-batch


def distribute(
    mine: Sequence[TrainSample],
    place: Place,
    layout: Layout,
    *,
    mini_batches: int,
    max_tokens: int,
    routes: RouteExchange | None = None,
    tops: TopExchange | None = None,
) -> list[MiniBatch]:
    """Makes this rank's mini-batches from the samples that the leaders fetched. Collective.

    `mine`: this leader's samples, each with a routing trace if there are `routes`, and with top tokens if there are
    `tops`; empty if this rank leads no replica.
    """
    sizes, home = _exchange_sizes(mine, place)
    schedule = plan(
        sizes,
        mini_batches=mini_batches,
        dp=layout.dp,
        max_tokens=max_tokens,
        micro_batch_multiple=layout.micro_batch_multiple,
        align=layout.sequence_multiple,
        home=home,
    )
    target = {
        i: dp
        for step in schedule.steps
        for dp, micro_batches in enumerate(step.micro_batches)
        for micro_batch in micro_batches
        for i in micro_batch
    }
    moving = [s for s in mine if target[s.index] != place.dp]
    arriving = [s for part in all_gather_bytes(_encode(moving), place.control) for s in _decode(part)]
    here = [*mine, *arriving] if place.leads_replica else []
    wanted = [s for s in here if target[s.index] == place.dp]
    samples = {s.index: s for s in _decode(broadcast_bytes(_encode(wanted), place.replica))}
    homes = {size.index: replica for size, replica in zip(sizes, home, strict=True)}
    traces = {}
    if routes is not None:
        traces = routes.migrate({s.index: _trace(s) for s in mine}, homes, target)
    likely = {}
    if tops is not None:
        likely = tops.migrate({s.index: _top_tokens(s) for s in mine}, homes, target)
    batches = []
    for step in schedule.steps:
        parts = step.micro_batches[place.dp]
        packed = pack_all(
            [[(samples[i].sample, samples[i].advantage) for i in part] for part in parts],
            cp=layout.cp,
            tp=layout.tp,
            multiple=layout.token_multiple,
            equal=layout.vpp > 1,
        )
        if tops is not None:
            packed = tops.scatter(likely, [[(i, samples[i].sample) for i in part] for part in parts], packed)
        sliced = None if routes is None else routes.scatter(traces, parts, packed)
        outcomes = tuple(tuple(_outcome(samples[i]) for i in part) for part in parts)
        batches.append(MiniBatch(step.mini_batch, packed, outcomes, step.denominators, sliced))
    return batches


def _outcome(sample: TrainSample) -> Outcome:
    verdict = sample.sample.verdict
    if verdict is None:
        return Outcome(sample.index, sample.group, 0.0)
    return Outcome(sample.index, sample.group, verdict.reward, verdict.lost)


def _trace(sample: TrainSample) -> RoutingTrace:
    trace = sample.sample.trace
    if trace is None:
        raise ValueError(f"prompt {sample.sample.prompt.id!r} sample {sample.sample.index} has no routing trace")
    return trace


def _top_tokens(sample: TrainSample) -> TopTokens:
    top = sample.sample.top_tokens
    if top is None:
        raise ValueError(f"prompt {sample.sample.prompt.id!r} sample {sample.sample.index} has no top tokens")
    return top


def _exchange_sizes(mine: Sequence[TrainSample], place: Place) -> tuple[list[SampleSize], list[int]]:
    """Returns all samples' sizes in global order, and the replica that holds each."""
    rows = [[s.index, s.group, len(s.sample.token_ids), s.sample.response_tokens, place.dp] for s in mine]
    everyone = [row for part in all_gather_bytes(orjson.dumps(rows), place.control) for row in orjson.loads(part)]
    everyone.sort()
    return [SampleSize(*row[:4]) for row in everyone], [row[4] for row in everyone]


def _encode(samples: Sequence[TrainSample]) -> bytes:
    header = orjson.dumps([[s.index, s.group, s.advantage] for s in samples])
    return len(header).to_bytes(8, "little") + header + encode_samples([s.sample for s in samples])


def _decode(data: bytes) -> list[TrainSample]:
    length = int.from_bytes(data[:8], "little")
    header: Sequence[Sequence[float]] = orjson.loads(data[8 : 8 + length])
    samples = decode_samples(data[8 + length :])
    return [
        TrainSample(int(index), int(group), sample, float(advantage))
        for (index, group, advantage), sample in zip(header, samples, strict=True)
    ]
