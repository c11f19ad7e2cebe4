"""Advantages that need a forward pass: from the critic's values, or from rewards less a KL penalty.

They are made on the last pipeline stage, where log-probs and values are. What they need of other replicas is exchanged
as a few numbers: the moments of all tokens' advantages, or each response's penalised reward.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson
from torch import Tensor

from megatron_rl.config.schema import AdvantageConfig, ObjectiveConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.distribute import MiniBatch, Outcome
from megatron_rl.engine.exchange import all_gather_bytes
from megatron_rl.engine.parallel import Place
from megatron_rl.objectives.advantages import Moments, gae, group_advantages, token_rewards
from megatron_rl.objectives.kl import ESTIMATORS, in_reward

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Of one packed micro-batch, [T] float64 each, 0 outside the loss mask."""

    advantages: Doubles
    returns: Doubles
    """A + V_old."""
    outcomes: Doubles
    """The discounted rewards that followed each token."""


def wait_for_policies(objective: ObjectiveConfig) -> bool:
    """Whether advantages cannot be had from the rewards alone, and are made by `finish` after the forward passes."""
    return objective.advantage.estimator == "gae" or in_reward(objective)


def kl_penalties(
    objective: ObjectiveConfig, old_logprobs: Sequence[Tensor], reference_logprobs: Sequence[Tensor]
) -> list[Doubles]:
    """beta KL(pi_old, pi_ref) [T] of each micro-batch, estimated by token; what stands outside the mask is not read."""
    assert objective.kl.beta is not None
    estimate = ESTIMATORS[objective.kl.kind]
    pairs = zip(old_logprobs, reference_logprobs, strict=True)
    return [(objective.kl.beta * estimate((ref - old).double())).cpu().numpy() for old, ref in pairs]


def group_finish(
    mini_batches: Sequence[MiniBatch], penalties: Sequence[Sequence[Doubles]], config: AdvantageConfig, place: Place
) -> list[MiniBatch]:
    """The mini-batches with group advantages of each response's reward less the sum of its penalties. Collective;
    penalties are [] per mini-batch off the last pipeline stage."""
    rows: list[tuple[int, int, float]] = []
    for mini_batch, parts in zip(mini_batches, penalties, strict=True):
        for packed, outcomes, penalty in zip(mini_batch.micro_batches, mini_batch.outcomes, parts, strict=bool(parts)):
            for outcome, at in _responses(packed, outcomes):
                rows.append((outcome.index, outcome.group, outcome.reward - float(penalty[at].sum())))
    speaks = place.tp == place.cp == 0
    groups: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for part in all_gather_bytes(orjson.dumps(rows if speaks else []), place.control):
        for index, group, reward in orjson.loads(part):
            groups[group][index] = reward
    advantages: dict[int, float] = {}
    for members in groups.values():
        order = sorted(members)
        values = group_advantages([members[index] for index in order], config)
        advantages.update(zip(order, values.tolist(), strict=True))

    def spread(packed: PackedBatch, outcomes: Sequence[Outcome]) -> Doubles:
        values = np.zeros(packed.tokens)
        for outcome, at in _responses(packed, outcomes):
            values[at] = advantages[outcome.index]
        return values

    return [
        _with_advantages(batch, [spread(*pair) for pair in zip(batch.micro_batches, batch.outcomes, strict=True)])
        for batch in mini_batches
    ]


def gae_finish(
    mini_batches: Sequence[MiniBatch],
    values: Sequence[Sequence[Tensor]],
    penalties: Sequence[Sequence[Doubles]] | None,
    config: AdvantageConfig,
    place: Place,
) -> tuple[list[MiniBatch], list[list[Estimate]]]:
    """The mini-batches with generalised advantages, normalised over all tokens of the rollout batch, and the estimates
    they are made of. Collective; values and penalties are [] per mini-batch off the last pipeline stage."""
    estimates = []
    for number, (mini_batch, parts) in enumerate(zip(mini_batches, values, strict=True)):
        taken = [None] * len(parts) if penalties is None else penalties[number]
        estimates.append(
            [
                _estimate(packed, outcomes, value.double().cpu().numpy(), penalty, config)
                for packed, outcomes, value, penalty in zip(
                    mini_batch.micro_batches, mini_batch.outcomes, parts, taken, strict=bool(parts)
                )
            ]
        )
    mine = Moments()
    for mini_batch, found in zip(mini_batches, estimates, strict=True):
        for packed, estimate in zip(mini_batch.micro_batches, found, strict=bool(found)):
            mine += Moments.of(estimate.advantages[packed.loss_mask])
    speaks = place.tp == place.cp == 0
    moments = Moments()
    for part in all_gather_bytes(orjson.dumps(dataclasses.astuple(mine if speaks else Moments())), place.control):
        moments += Moments(*orjson.loads(part))
    finished = [
        _with_advantages(batch, [moments.normalise(estimate.advantages, config) for estimate in found])
        for batch, found in zip(mini_batches, estimates, strict=True)
    ]
    return finished, estimates


def _estimate(
    packed: PackedBatch, outcomes: Sequence[Outcome], values: Doubles, penalty: Doubles | None, config: AdvantageConfig
) -> Estimate:
    assert config.gamma is not None
    assert config.gae_lambda is not None
    advantages, returns, following = (np.zeros(packed.tokens) for _ in range(3))
    for outcome, at in _responses(packed, outcomes):
        rewards = token_rewards(outcome.reward, np.zeros(len(at)) if penalty is None else penalty[at])
        advantages[at], returns[at] = gae(rewards, values[at], config.gamma, config.gae_lambda)
        following[at], _ = gae(rewards, np.zeros(len(at)), config.gamma, 1.0)
    return Estimate(advantages, returns, following)


def _responses(packed: PackedBatch, outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, npt.NDArray[np.int64]]]:
    """Each sequence with the positions of its masked-in tokens, which may be none."""
    for outcome, start, end in zip(outcomes, packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True):
        yield outcome, start + np.flatnonzero(packed.loss_mask[start:end])


def _with_advantages(mini_batch: MiniBatch, advantages: Sequence[Doubles]) -> MiniBatch:
    """Off the last stage, where no loss is computed, there are none, and the mini-batch stays as it is."""
    if not advantages:
        return mini_batch
    replaced = tuple(
        dataclasses.replace(packed, advantages=(values * packed.loss_mask).astype(np.float32))
        for packed, values in zip(mini_batch.micro_batches, advantages, strict=True)
    )
    return dataclasses.replace(mini_batch, micro_batches=replaced)
