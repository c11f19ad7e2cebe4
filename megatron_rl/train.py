"""The loop: rollout, rewards, advantages, schedule, pi_old and its kin, N mini-batches of update, weight sync, metrics.

One step asks the servers for `prompts_per_step` groups, and makes `mini_batches` optimizer steps of them. Everything
here runs on every rank; what only some ranks do is inside the calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group
from megatron_rl.engine.distribute import MiniBatch, TrainSample, distribute
from megatron_rl.engine.packed_advantages import needs_forward_pass
from megatron_rl.experience import measure_router_shift, prepare
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.rewards.shaping import is_lost
from megatron_rl.session import Session, open_session


def train(config: Config, resume: bool = False) -> None:
    """Runs `config.train.steps` steps; with `resume`, those that are left after the newest complete checkpoint. The
    trained model is then a Hugging Face directory, run_dir/model, and the critic run_dir/critic."""
    with open_session(config, resume) as session:
        session.sync_weights()
        if session.owes_evaluation:  # before the first step, and where a run was stopped
            session.evaluate()
        session.trainer.console.timer.drain()  # the first weight sync is no step's
        while session.step < config.train.steps:
            groups = session.rollout()
            mini_batches = schedule(session, with_advantages(groups, config))
            updates = prepare(session, mini_batches)
            for update in updates:
                measure_router_shift(session, update)
                session.update(update)
            session.finish_epochs(updates)
            session.finish_step()
            if session.owes_evaluation:
                session.evaluate()
            session.checkpoint()
        session.export()


def with_advantages(groups: Sequence[Group], config: Config) -> list[TrainSample]:
    """Numbers the samples over all leaders, and gives each its advantage among those of its group that have a verdict;
    0 for one without, and for all if that waits for a forward pass (experience.prepare)."""
    samples = []
    for group in groups:
        rewards = {i: _reward(group, i) for i, sample in enumerate(group.samples) if not is_lost(sample)}
        advantages = np.zeros(len(group.samples))
        if rewards and not needs_forward_pass(config.objective):
            advantages[list(rewards)] = group_advantages(list(rewards.values()), config.objective.advantage)
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
