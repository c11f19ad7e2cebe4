"""What the updates of a step need of the policies before them: pi_old, pi_ref, the critic's values, and advantages that
wait for these. Everything here is collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_advantages import Doubles, gae_finish, group_finish, kl_penalties, needs_forward_pass
from megatron_rl.engine.packed_losses import PolicyLoss, ValueLoss, without_rejected
from megatron_rl.objectives.kl import in_reward
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.routing.shift import packed_shift
from megatron_rl.session import Session


@dataclass(frozen=True)
class Update:
    """One mini-batch, and what its optimizer steps are to do."""

    mini_batch: MiniBatch
    loss: PolicyLoss
    routing: MiniBatchRouting | None
    value_loss: ValueLoss | None


@dataclass(frozen=True)
class _Passes:
    """Of one mini-batch: [T] per micro-batch each, and [] off the last pipeline stage."""

    routing: MiniBatchRouting | None
    old: list[Tensor] | None  # None: taken from the update's own forward pass
    reference: list[Tensor] | None
    values: list[Tensor] | None


def prepare(session: Session, mini_batches: Sequence[MiniBatch]) -> list[Update]:
    """The updates of a step, in order."""
    config, trainer = session.config, session.trainer
    passes = [_passes(session, mini_batch) for mini_batch in mini_batches]
    estimates = None
    if needs_forward_pass(config.objective):
        penalties = _penalties(session, mini_batches, passes)
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
            reference_logprobs=each.reference,
            old_is_rollout=each.old is not None and not config.train.recompute_old_logprobs,
        )
        updates.append(Update(mini_batch, loss, each.routing, value_loss))
    return updates


def _passes(session: Session, mini_batch: MiniBatch) -> _Passes:
    """The forward passes, packed as the update will be, so that the first mini-batch's ratios are exactly 1."""
    trainer = session.trainer
    batches = mini_batch.micro_batches
    routing = session.routing(mini_batch)
    reference = values = None
    with trainer.phase("old log-probs"):
        old = _old(session, mini_batch, routing)
    if trainer.reference is not None:
        with trainer.phase("reference log-probs"):
            reference = [logprobs for logprobs, _ in trainer.reference.logprobs(batches)]
    if trainer.critic is not None:
        with trainer.phase("values"):
            values = trainer.critic.values(batches)
    return _Passes(routing, old, reference, values)


def _old(session: Session, mini_batch: MiniBatch, routing: MiniBatchRouting | None) -> list[Tensor] | None:
    """pi_old's log-probs. Without `recompute_old_logprobs` they are those of the update's own forward pass, or, where
    there are several updates, mu's."""
    config, policy = session.config, session.trainer.policy
    batches = mini_batch.micro_batches
    if not config.train.recompute_old_logprobs:
        if config.train.mini_batches == 1:
            return None
        return _of_rollout(session, mini_batch)
    routed = routing.old_pass() if routing else None
    old = [logprobs for logprobs, _ in policy.logprobs(batches, routing=routed)]
    if routing and session.due(config.routing.noise_floor):
        policy.logprobs(batches, routing=routing.rerun_pass())
    return old


def _of_rollout(session: Session, mini_batch: MiniBatch) -> list[Tensor]:
    policy = session.trainer.policy
    if not policy.is_last_stage:
        return []
    return [torch.as_tensor(batch.rollout_logprobs, device=policy.device) for batch in mini_batch.micro_batches]


def _penalties(
    session: Session, mini_batches: Sequence[MiniBatch], passes: Sequence[_Passes]
) -> list[list[Doubles]] | None:
    """Of the KL in the reward; None where there is none. Where pi_old is not known yet, mu, which sampled, is taken."""
    objective = session.config.objective
    if not in_reward(objective):
        return None
    olds = [
        _of_rollout(session, mini_batch) if each.old is None else each.old
        for mini_batch, each in zip(mini_batches, passes, strict=True)
    ]
    return [kl_penalties(objective, old, each.reference or []) for old, each in zip(olds, passes, strict=True)]


def measure_router_shift(session: Session, update: Update) -> None:
    """RSPO's factor of every token, right before its update, by one more forward pass; in the first mini-batch too,
    where it comes out as exactly 1. Nothing for an objective without it."""
    routing, batches = update.routing, update.mini_batch.micro_batches
    if routing is None or routing.shift is None:
        return
    policy, shift = session.trainer.policy, routing.shift
    with session.trainer.phase("router shift"):
        policy.logprobs(batches, routing=routing.shift_pass(shift))
        layers = len(policy.arch.moe_layers)
        update.loss.router_shift = packed_shift(shift.distances, batches, layers, policy.layout, policy.place)
