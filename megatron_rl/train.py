"""The loop: rollout, rewards, advantages, schedule, old log-probs, N mini-batches of update, weight sync, metrics.

One step asks the servers for `prompts_per_step` groups, and makes `mini_batches` optimizer steps of them. Everything
here runs on every rank; what only some ranks do is inside the calls.
"""

from __future__ import annotations

from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group
from megatron_rl.engine.distribute import MiniBatch, TrainSample, distribute
from megatron_rl.engine.losses import PolicyLoss
from megatron_rl.lab.metrics import ROLLOUT, rollout_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.session import Session, open_session


def train(config: Config, resume: bool = False) -> None:
    """Runs `config.train.steps` steps; with `resume`, those that are left after the newest complete checkpoint."""
    with open_session(config, resume) as session:
        session.sync_weights()
        session.evaluate(when=session.step == 0)
        while session.step < config.train.steps:
            groups = session.rollout()
            samples = with_advantages(groups, config)
            mini_batches = distribute(
                samples,
                session.place,
                session.layout,
                mini_batches=config.train.mini_batches,
                max_tokens=config.engine.max_tokens_per_micro_batch,
            )
            session.log_rollout(_measured(groups, session))
            losses = old_logprobs(session, mini_batches)
            for mini_batch, loss in zip(mini_batches, losses, strict=True):
                update(session, mini_batch, loss)
            session.advance()
            session.sync_weights()
            session.evaluate(when=_every(config.eval.every, session))
            session.checkpoint(when=_every(config.checkpoint.every, session))
            session.log_step()


def with_advantages(groups: list[Group], config: Config) -> list[TrainSample]:
    """Numbers the samples over all leaders, and gives each its group's normalised reward."""
    samples = []
    for group in groups:
        rewards = [sample.verdict.reward for sample in group.samples if sample.verdict is not None]
        advantages = group_advantages(rewards, config.objective.advantage)
        for sample, advantage in zip(group.samples, advantages, strict=True):
            index = group.index * config.rollout.group_size + sample.index
            samples.append(TrainSample(index, group.index, sample, float(advantage)))
    return samples


def old_logprobs(session: Session, mini_batches: list[MiniBatch]) -> list[PolicyLoss]:
    """pi_old of every micro-batch, under the very packing that the update will use, or none to take the update's own."""
    config = session.config
    with session.phase("old log-probs"):
        losses = []
        for mini_batch in mini_batches:
            old = None
            if config.train.recompute_old_logprobs:
                old = [logprobs for logprobs, _ in session.policy.logprobs(mini_batch.micro_batches)]
            losses.append(PolicyLoss(config.objective, mini_batch, old, session.device))
    return losses


def update(session: Session, mini_batch: MiniBatch, loss: PolicyLoss) -> None:
    with session.phase("update"):
        result = session.policy.update(mini_batch.micro_batches, loss)
    metrics = session.reduce(loss.metrics, holds_samples=session.policy.is_last_stage)
    session.log_update(mini_batch.index, metrics, result)


def _measured(groups: list[Group], session: Session) -> dict[str, float]:
    metrics = MetricAccumulator(ROLLOUT)
    rollout_metrics(metrics, groups, session.weight_version)
    return session.reduce(metrics, holds_samples=session.place.leads_replica)


def _every(steps: int, session: Session) -> bool:
    """Every so many steps, and after the last."""
    last = session.step == session.config.train.steps
    return last or (steps > 0 and session.step % steps == 0)
