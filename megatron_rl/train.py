"""The loop: rollout, rewards, advantages, schedule, old log-probs, N mini-batches of update, weight sync, metrics.

One step asks the servers for `prompts_per_step` groups, and makes `mini_batches` optimizer steps of them. Everything
here runs on every rank; what only some ranks do is inside the calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group
from megatron_rl.engine.distribute import MiniBatch, TrainSample, distribute
from megatron_rl.engine.losses import PolicyLoss, without_rejected
from megatron_rl.engine.shift import packed_shift
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.session import Session, open_session


def train(config: Config, resume: bool = False) -> None:
    """Runs `config.train.steps` steps; with `resume`, those that are left after the newest complete checkpoint. The
    trained model is then a Hugging Face directory, run_dir/model."""
    with open_session(config, resume) as session:
        session.sync_weights()
        if session.step == 0:
            session.evaluate()
        session.trainer.console.timer.drain()  # the first weight sync is no step's
        while session.step < config.train.steps:
            groups = session.rollout()
            mini_batches = schedule(session, with_advantages(groups, config))
            updates = old_policy(session, mini_batches)
            for mini_batch, (loss, routing) in zip(mini_batches, updates, strict=True):
                loss.router_shift = router_shift(session, mini_batch, routing)
                metrics = session.trainer.update(mini_batch, loss, routing)
                session.log_update(mini_batch.index, metrics)
            session.finish_step()
            if _due(config.eval.every, session):
                session.evaluate()
            if _due(config.checkpoint.every, session):
                session.save()
        session.trainer.export(session.trainer.run.path / "model")


def with_advantages(groups: Sequence[Group], config: Config) -> list[TrainSample]:
    """Numbers the samples over all leaders, and gives each its group's normalised reward."""
    samples = []
    for group in groups:
        rewards = [_reward(group, index) for index in range(len(group.samples))]
        advantages = group_advantages(rewards, config.objective.advantage)
        for sample, advantage in zip(group.samples, advantages, strict=True):
            index = group.index * config.rollout.group_size + sample.index
            samples.append(TrainSample(index, group.index, sample, float(advantage)))
    return samples


def _reward(group: Group, index: int) -> float:
    verdict = group.samples[index].verdict
    if verdict is None:
        raise ValueError(f"prompt {group.prompt.id!r} sample {index}: no verdict; judge it before training on it")
    return verdict.reward


def schedule(session: Session, samples: Sequence[TrainSample]) -> list[MiniBatch]:
    config = session.config
    with session.trainer.phase("schedule"):
        return distribute(
            samples,
            session.trainer.place,
            session.trainer.layout,
            mini_batches=config.train.mini_batches,
            max_tokens=config.engine.max_tokens_per_micro_batch,
            routes=session.route_exchange,
        )


def old_policy(session: Session, mini_batches: Sequence[MiniBatch]) -> list[tuple[PolicyLoss, MiniBatchRouting | None]]:
    """pi_old of every micro-batch: its log-probs and its experts, packed as the update will have them, so that the
    first mini-batch's ratios are exactly 1. Without `recompute_old_logprobs` the update's own forward pass serves."""
    config, policy = session.config, session.trainer.policy
    updates = []
    with session.trainer.phase("old log-probs"):
        for mini_batch in mini_batches:
            routing = session.routing(mini_batch)
            old = None
            if config.train.recompute_old_logprobs:
                routed = routing.old_pass() if routing else None
                old = [logprobs for logprobs, _ in policy.logprobs(mini_batch.micro_batches, routing=routed)]
                mini_batch = without_rejected(mini_batch, config.objective, old, session.trainer.place)
                if routing and _due(config.routing.noise_floor, session):
                    policy.logprobs(mini_batch.micro_batches, routing=routing.rerun_pass())
            updates.append((PolicyLoss(config.objective, mini_batch, old, policy.device), routing))
    return updates


def router_shift(session: Session, mini_batch: MiniBatch, routing: MiniBatchRouting | None) -> list[Tensor] | None:
    """RSPO's factor of every token, [T] for each micro-batch; None for an objective without it. One more forward pass,
    for the first mini-batch too, where it comes out as exactly 1."""
    if routing is None or routing.shift is None:
        return None
    policy, shift = session.trainer.policy, routing.shift
    with session.trainer.phase("router shift"):
        policy.logprobs(mini_batch.micro_batches, routing=routing.shift_pass(shift))
        layers = len(policy.arch.moe_layers)
        return packed_shift(shift.log_sums, mini_batch.micro_batches, layers, policy.layout, policy.place)


def _due(every: int, session: Session) -> bool:
    """Every so many steps, and after the last."""
    return session.step == session.config.train.steps or (every > 0 and session.step % every == 0)
