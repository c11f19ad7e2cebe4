"""Advantages that need a forward pass: from the critic's values, or from rewards less a KL penalty.

They are made on the last pipeline stage, where log-probs and values are. What they need of other replicas is exchanged
as a few numbers: the moments of all tokens' advantages, or each response's penalised reward.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_rl.config.switches import KL, AdvantageConfig, Gae, ObjectiveConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.distribute import MiniBatch, Outcome
from megatron_rl.errors import UserError
from megatron_rl.objectives.advantages import Moments, gae, group_advantages, token_rewards
from megatron_rl.objectives.kl import ESTIMATORS, in_reward
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.place import Place

Doubles = npt.NDArray[np.float64]


class NotFiniteError(UserError):
    """A value of the critic or a KL penalty that is not finite; the same on every rank."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Advantages of one packed micro-batch and what they are made of: [T] float64 each, 0 outside the loss mask."""

    advantages: Doubles
    returns: Doubles
    """A + V_old."""
    rewards_to_go: Doubles
    """The discounted rewards that followed each token, no value among them."""


def needs_forward_pass(objective: ObjectiveConfig) -> bool:
    """Tells whether advantages need more than rewards, and are made after the forward passes."""
    return isinstance(objective.advantage, Gae) or in_reward(objective)


def kl_penalties(
    objective: ObjectiveConfig, old_logprobs: Sequence[Tensor], reference_logprobs: Sequence[Tensor]
) -> list[Doubles]:
    """beta KL(pi_old, pi_ref), [T] float64 for each micro-batch, estimated per token; values outside the loss mask are
    meaningless."""
    kl = objective.kl
    assert isinstance(kl, KL)
    estimate = ESTIMATORS[kl.kind]
    pairs = zip(old_logprobs, reference_logprobs, strict=True)
    return [(kl.beta * estimate((ref - old).double())).cpu().numpy() for old, ref in pairs]


def group_finish(
    mini_batches: Sequence[MiniBatch], penalties: Sequence[Sequence[Doubles]], config: AdvantageConfig, place: Place
) -> list[MiniBatch]:
    """Returns the mini-batches with group advantages of each response's reward less its penalties. Collective.

    penalties, as kl_penalties gives them: for each mini-batch [T] float64 per micro-batch, or [] if this is not the
    last pipeline stage. Raises NotFiniteError.
    """
    rows: list[tuple[int, int, float]] = []
    for mini_batch, parts in zip(mini_batches, penalties, strict=True):
        for packed, outcomes, penalty in zip(mini_batch.micro_batches, mini_batch.outcomes, parts, strict=bool(parts)):
            for outcome, at in responses(packed, outcomes):
                if not outcome.lost:
                    rows.append((outcome.index, outcome.group, outcome.reward - float(penalty[at].sum())))
    groups: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for part in _gather(rows if place.speaks_for_stage else [], place):
        for index, group, reward in part:
            groups[group][index] = reward
    _check_finite({index: reward for members in groups.values() for index, reward in members.items()})
    advantages: dict[int, float] = {}
    for members in groups.values():
        order = sorted(members)
        values = group_advantages([members[index] for index in order], config)
        advantages.update(zip(order, values.tolist(), strict=True))

    def spread(packed: PackedBatch, outcomes: Sequence[Outcome]) -> Doubles:
        values = np.zeros(packed.tokens)
        for outcome, at in responses(packed, outcomes):
            values[at] = advantages.get(outcome.index, 0.0)
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
    """Returns the mini-batches with generalised advantages, normalised over all tokens of the rollout batch, and their
    estimates. Collective.

    values: the critic's before the first update, for each mini-batch [T] fp32 per micro-batch. penalties: as in
    group_finish; None without KL in the reward. Both are [] if this is not the last pipeline stage. Raises
    NotFiniteError.
    """
    assert isinstance(config, Gae)
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
    mine, sums = Moments(), {}
    for mini_batch, found in zip(mini_batches, estimates, strict=True):
        for packed, outcomes, estimate in zip(mini_batch.micro_batches, mini_batch.outcomes, found, strict=bool(found)):
            mine += Moments.of(estimate.advantages[packed.loss_mask])
            sums.update({o.index: float(estimate.returns[at].sum()) for o, at in responses(packed, outcomes)})
    bad = {index: total for index, total in sums.items() if not math.isfinite(total)}
    moments = Moments()
    for moment, its_bad in _gather([astuple(mine), list(bad.items())] if place.speaks_for_stage else [[], []], place):
        moments += Moments(*moment)
        bad |= dict(its_bad)
    _check_finite(bad)
    finished = [
        _with_advantages(batch, [moments.normalise(estimate.advantages, config) for estimate in found])
        for batch, found in zip(mini_batches, estimates, strict=True)
    ]
    return finished, estimates


def _estimate(
    packed: PackedBatch, outcomes: Sequence[Outcome], values: Doubles, penalty: Doubles | None, config: Gae
) -> Estimate:
    advantages, returns, following = (np.zeros(packed.tokens) for _ in range(3))
    for outcome, at in responses(packed, outcomes):
        rewards = token_rewards(outcome.reward, np.zeros(len(at)) if penalty is None else penalty[at])
        advantages[at], returns[at] = gae(rewards, values[at], config.gamma, config.gae_lambda)
        following[at], _ = gae(rewards, np.zeros(len(at)), config.gamma, 1.0)
    return Estimate(advantages, returns, following)


def _gather(mine: Any, place: Place) -> list[Any]:
    """Gathers numbers by the standard library's JSON, which keeps NaN and infinities; orjson turns them into null."""
    return [json.loads(part) for part in all_gather_bytes(json.dumps(mine).encode(), place.control)]


def _check_finite(rewards: Mapping[int, float]) -> None:
    """Raises NotFiniteError. Rewards were finite when they were given, but a penalty may not be."""
    bad = sorted(index for index, reward in rewards.items() if not math.isfinite(reward))
    if bad:
        raise NotFiniteError(
            f"sample {bad[0]} of this step, and {len(bad) - 1} more: the critic's value of a token, or the log-prob of "
            "pi_old or pi_ref in its KL penalty, is not finite, so there is no advantage. Look at critic/value, "
            "critic/grad_norm and kl/policy_reference in the lines before, and go on from an earlier checkpoint with a "
            "lower learning rate"
        )


def responses(packed: PackedBatch, outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, npt.NDArray[np.int64]]]:
    """Yields each sequence's outcome and the positions of its masked-in tokens, which may be none."""
    if packed.is_empty:
        return
    for outcome, start, end in zip(outcomes, packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True):
        yield outcome, start + np.flatnonzero(packed.loss_mask[start:end])


def _with_advantages(mini_batch: MiniBatch, advantages: Sequence[Doubles]) -> MiniBatch:
    """Puts advantages into the mini-batch. Without any, as on all stages but the last, it stays as it is."""
    if not advantages:
        return mini_batch
    replaced = tuple(
        dataclasses.replace(packed, advantages=(values * packed.loss_mask).astype(np.float32))
        for packed, values in zip(mini_batch.micro_batches, advantages, strict=True)
    )
    return dataclasses.replace(mini_batch, micro_batches=replaced)
