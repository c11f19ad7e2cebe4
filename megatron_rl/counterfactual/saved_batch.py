"""One saved rollout batch on the ranks of a study: its mini-batches, and its tokens in one order in every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson
from torch import Tensor

from megatron_rl.config.schema import Config
from megatron_rl.counterfactual.ratio_figures import Doubles
from megatron_rl.data.prompts import PromptCursor
from megatron_rl.data.sample import Group
from megatron_rl.disk import write_durably
from megatron_rl.engine.distribute import MiniBatch, distribute
from megatron_rl.engine.packed_advantages import responses
from megatron_rl.engine.top_exchange import TopExchange
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.rollouts import SavedGroups
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import all_gather_bytes, together
from megatron_rl.ranks.place import Place
from megatron_rl.rewards.shaping import filter_overlong, shape_rewards, without_lost
from megatron_rl.routing.exchange import RouteExchange
from megatron_rl.routing.wire import RouteSpec
from megatron_rl.train import with_advantages


@dataclass(frozen=True, eq=False)
class SavedBatch:
    """The rollout batch of one step on this rank."""

    groups: list[Group]
    """This leader's groups, with the verifiers' own rewards; [] on ranks that lead no replica."""
    without_traces: int
    """Samples of all leaders without a routing trace. 0: the rollout's routes can be replayed."""
    top_k: int
    """How many of mu's most likely tokens each token of all leaders has; 0 if they were not read or a sample lacks
    them."""
    mini_batches: list[MiniBatch]
    """Packed as a run with this configuration packs them."""


def load_batch(config: Config, trainer: Trainer, step: int, *, with_top: bool = False) -> SavedBatch:
    """Reads step `step` of rollout.replay_from, and the samples' top tokens `with_top`. Collective.

    Raises UserError, on every rank, if there are no such rollouts, if they do not fit the configuration, or if their
    traces are not of this model's routers.
    """
    progress = Progress(step - 1, step, PromptCursor(config.seed))
    groups = SavedGroups(config, trainer, None).draw(progress).kept
    mine = [
        (sample.trace is None, sample.top_tokens.k if with_top and sample.top_tokens else 0)
        for group in groups
        for sample in group.samples
    ]
    every = [
        each for part in all_gather_bytes(orjson.dumps(mine), trainer.place.control) for each in orjson.loads(part)
    ]
    missing = sum(untraced for untraced, _ in every)
    counts = {count for _, count in every}
    top_k = counts.pop() if len(counts) == 1 else 0
    if trainer.policy.arch.num_experts and not missing:
        spec = RouteSpec.of(trainer.policy.arch)
        with together(trainer.place.control):
            for sample in (sample for group in groups for sample in group.samples):
                assert sample.trace is not None
                spec.check(sample.trace)
    mini_batches = pack_batch(config, trainer, groups, config.engine.max_tokens_per_micro_batch, missing == 0, top_k)
    return SavedBatch(groups, missing, top_k, mini_batches)


def pack_batch(
    config: Config, trainer: Trainer, groups: Sequence[Group], max_tokens: int, has_traces: bool, top_k: int
) -> list[MiniBatch]:
    """Cuts all leaders' groups into mini-batches of micro-batches of at most `max_tokens`. Collective."""
    policy = trainer.policy
    exchange = None
    if has_traces and policy.arch.num_experts:
        exchange = RouteExchange(policy.arch, policy.routers.layers, trainer.place, trainer.layout)
    return distribute(
        with_advantages(shaped(groups, config), config),
        trainer.place,
        trainer.layout,
        mini_batches=config.train.mini_batches,
        max_tokens=max_tokens,
        routes=exchange,
        tops=TopExchange(top_k, trainer.place, trainer.layout) if top_k else None,
    )


def shaped(groups: Sequence[Group], config: Config) -> list[Group]:
    """Returns the groups with rewards and masks as a run with this configuration trains on them."""
    rewarded = shape_rewards(without_lost(groups), config.reward, config.rollout.max_response_tokens)
    return filter_overlong(rewarded, config.reward)


def gather_tokens(
    mini_batches: Sequence[MiniBatch], values: Sequence[Sequence[Tensor]], place: Place
) -> list[dict[int, Doubles]]:
    """Returns, for each mini-batch, the values [|y|] float64 of each response's tokens by sample number, ascending.

    values: for each mini-batch [T] per micro-batch; [] if this is not the last pipeline stage. Every rank of every
    layout gets the same dictionaries, in the same order. Collective.
    """
    rows: list[list[int]] = []
    parts: list[Doubles] = [np.zeros(0)]
    if place.speaks_for_stage:
        for number, (mini_batch, outputs) in enumerate(zip(mini_batches, values, strict=True)):
            batches = zip(mini_batch.micro_batches, mini_batch.outcomes, outputs, strict=bool(outputs))
            for packed, outcomes, output in batches:
                array = output.detach().double().cpu().numpy()
                for outcome, at in responses(packed, outcomes):
                    own = array[at].ravel()
                    rows.append([number, outcome.index, len(own)])
                    parts.append(own)
    header = orjson.dumps(rows)
    mine = len(header).to_bytes(8, "little") + header + np.concatenate(parts).tobytes()
    found: list[dict[int, Doubles]] = [{} for _ in mini_batches]
    for data in all_gather_bytes(mine, place.control):
        end = 8 + int.from_bytes(data[:8], "little")
        sizes = orjson.loads(data[8:end])
        column = np.frombuffer(data[end:], dtype=np.float64)
        pieces = np.split(column, np.cumsum([count for _, _, count in sizes])[:-1]) if sizes else []
        for (number, index, _), piece in zip(sizes, pieces, strict=True):
            found[number][index] = piece
    return [{index: each[index] for index in sorted(each)} for each in found]


def gather_heads(
    mini_batches: Sequence[MiniBatch], values: Sequence[Sequence[Tensor]], place: Place, top_k: int
) -> list[dict[int, Doubles]]:
    """As gather_tokens, for values [T, top_k] of the top tokens; returns [|y|, top_k]. Collective."""
    flat = gather_tokens(mini_batches, values, place)
    return [{index: each.reshape(-1, top_k) for index, each in mini_batch.items()} for mini_batch in flat]


def joined(tokens: Sequence[dict[int, Doubles]]) -> Doubles:
    """Returns the tokens of all mini-batches, one after another."""
    return np.concatenate([np.zeros(0), *(piece for each in tokens for piece in each.values())])


def write_lines(trainer: Trainer, what: str, file: str, lines: Sequence[Mapping[str, object]]) -> None:
    """Writes rank 0's lines as JSON into `file` of the run directory. Raises DiskError, on every rank. Collective."""
    path = trainer.run.path / file
    with trainer.writing(f"{what} in {path}", path):
        if trainer.place.rank == 0:
            write_durably(path, b"".join(orjson.dumps(line) + b"\n" for line in lines))
