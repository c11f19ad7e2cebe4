"""Prepares the updates of a step: log-probs of pi_old and pi_ref, the critic's values, and advantages that need these.

Everything here is collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config.schema import Config
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_advantages import Doubles, gae_finish, group_finish, kl_penalties, needs_forward_pass
from megatron_rl.engine.packed_losses import PolicyLoss, ValueLoss, without_rejected
from megatron_rl.engine.policy import Policy
from megatron_rl.loop.trainer import Trainer
from megatron_rl.loop.updates import Update
from megatron_rl.objectives.kl import in_reward
from megatron_rl.routing.drift import RoutingStats
from megatron_rl.routing.exchange import valid_rows
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.routing.shift import RouterShift, packed_shift


@dataclass(frozen=True)
class _Passes:
    """One mini-batch's forward passes: [T] for each micro-batch, and [] off the last pipeline stage."""

    routing: MiniBatchRouting | None
    old: list[Tensor] | None  # None: taken from the update's own forward pass
    reference: list[Tensor] | None
    values: list[Tensor] | None


def prepare(
    config: Config,
    trainer: Trainer,
    mini_batches: Sequence[MiniBatch],
    *,
    weight_version: int,
    measures_noise: bool,
    records: bool = False,
) -> list[Update]:
    """The updates of a step, in order. `weight_version` is that of pi_old.

    `measures_noise` repeats pi_old's pass, to see which routes rounding changes. `records` keeps the values of each
    token.
    """
    passes = [_passes(config, trainer, mini_batch, measures_noise, records) for mini_batch in mini_batches]
    estimates = None
    if needs_forward_pass(config.objective):
        penalties = _penalties(config, trainer.policy, mini_batches, passes)
        if trainer.critic is None:
            assert penalties is not None
            finished = group_finish(mini_batches, penalties, config.objective.advantage, trainer.place)
        else:
            values = [each.values or [] for each in passes]
            finished, estimates = gae_finish(mini_batches, values, penalties, config.objective.advantage, trainer.place)
        mini_batches = finished
    updates = []
    for number, (mini_batch, each) in enumerate(zip(mini_batches, passes, strict=True)):
        value_loss = None
        if estimates is not None:
            assert config.critic is not None
            clip, old_values = config.critic.clip, each.values or []
            value_loss = ValueLoss(clip, mini_batch, old_values, estimates[number], trainer.policy.device)
        if each.old is not None:
            mini_batch = without_rejected(mini_batch, config.objective, each.old, trainer.place)
        loss = PolicyLoss(
            config.objective,
            mini_batch,
            each.old,
            trainer.policy.device,
            weight_version=weight_version,
            reference_logprobs=each.reference,
            old_is_rollout=each.old is not None and not config.train.recompute_old_logprobs,
            records=records and trainer.place.speaks_for_stage,
        )
        updates.append(Update(mini_batch, loss, each.routing, value_loss))
    return updates


def _passes(config: Config, trainer: Trainer, mini_batch: MiniBatch, measures_noise: bool, records: bool) -> _Passes:
    """The forward passes, packed as the update will be, so that the first mini-batch's ratios are exactly 1."""
    batches = mini_batch.micro_batches
    routing = _routing(config, trainer.policy, mini_batch, records)
    reference = values = None
    with trainer.journal.phase("old log-probs"):
        old = _old(config, trainer.policy, mini_batch, routing, measures_noise)
    if trainer.reference is not None:
        with trainer.journal.phase("reference log-probs"):
            reference = [logprobs for logprobs, _ in trainer.reference.logprobs(batches)]
    if trainer.critic is not None:
        with trainer.journal.phase("values"):
            values = trainer.critic.values(batches)
    return _Passes(routing, old, reference, values)


def _routing(config: Config, policy: Policy, mini_batch: MiniBatch, records: bool) -> MiniBatchRouting | None:
    """Makes the routing of this mini-batch's passes; None for a dense model."""
    arch = policy.arch
    if not arch.num_experts:
        return None
    valid = [valid_rows(batch, policy.layout, policy.place, policy.device) for batch in mini_batch.micro_batches]
    shifts = config.objective.router_shift is not None
    return MiniBatchRouting(
        config.routing,
        policy.routers,
        None if mini_batch.routes is None else [routes.to(policy.device) for routes in mini_batch.routes],
        valid,
        RoutingStats(
            arch.moe_layers,
            arch.num_experts,
            arch.experts_per_token,
            policy.device,
            micro_batches=len(valid),
            expert_ranks=policy.layout.ep,
            keeps_rows=records,
        ),
        RouterShift([len(rows) for rows in valid], policy.device) if shifts else None,
    )


def _old(
    config: Config, policy: Policy, mini_batch: MiniBatch, routing: MiniBatchRouting | None, measures_noise: bool
) -> list[Tensor] | None:
    """Returns pi_old's log-probs.

    Without `recompute_old_logprobs` they are mu's, or None if the only update takes them from its own forward pass.
    """
    batches = mini_batch.micro_batches
    if not config.train.recompute_old_logprobs:
        return None if config.train.mini_batches == 1 else _of_rollout(policy, mini_batch)
    old = [logprobs for logprobs, _ in policy.logprobs(batches, routing=routing.old_pass() if routing else None)]
    if routing and measures_noise:
        policy.logprobs(batches, routing=routing.rerun_pass())
    return old


def _of_rollout(policy: Policy, mini_batch: MiniBatch) -> list[Tensor]:
    """mu's log-probs; [] off the last pipeline stage."""
    if not policy.is_last_stage:
        return []
    return [torch.as_tensor(batch.rollout_logprobs, device=policy.device) for batch in mini_batch.micro_batches]


def _penalties(
    config: Config, policy: Policy, mini_batches: Sequence[MiniBatch], passes: Sequence[_Passes]
) -> list[list[Doubles]] | None:
    """The KL in the reward; None if there is none. While pi_old is not known, mu, which sampled, stands for it."""
    if not in_reward(config.objective):
        return None
    olds = [
        _of_rollout(policy, mini_batch) if each.old is None else each.old
        for mini_batch, each in zip(mini_batches, passes, strict=True)
    ]
    return [kl_penalties(config.objective, old, each.reference or []) for old, each in zip(olds, passes, strict=True)]


def measure_router_shift(trainer: Trainer, update: Update) -> None:
    """Gives the loss RSPO's factor of every token, by one more forward pass right before the update. It is exactly 1
    in the first mini-batch. Does nothing for an objective without it."""
    routing, batches = update.routing, update.mini_batch.micro_batches
    if routing is None or routing.shift is None:
        return
    policy, shift = trainer.policy, routing.shift
    with trainer.journal.phase("router shift"):
        policy.logprobs(batches, routing=routing.shift_pass(shift))
        layers = len(policy.arch.moe_layers)
        update.loss.router_shift = packed_shift(shift.distances, batches, layers, policy.layout, policy.place)
