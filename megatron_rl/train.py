"""The loop: rollout, rewards, advantages, schedule, pi_old and its kin, N mini-batches of update, weight sync, metrics.

One step asks the servers for `prompts_per_step` groups, and makes `mini_batches` optimizer steps of them. Everything
here runs on every rank; what only some ranks do is inside the calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group
from megatron_rl.engine.distribute import MiniBatch, TrainSample, distribute
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.packed_advantages import needs_forward_pass
from megatron_rl.lab.run_records import Resume
from megatron_rl.loop.experience import measure_router_shift, prepare
from megatron_rl.loop.gpu_turns import TRAINING
from megatron_rl.loop.parts import Parts, open_parts
from megatron_rl.loop.recorded_tokens import write_recorded
from megatron_rl.loop.rollouts import RolloutBatch
from megatron_rl.loop.updates import apply, train_critic_again
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.rewards.shaping import is_lost
from megatron_rl.rollout.pool import Pool, PoolOpener
from megatron_rl.stop import NothingLeft


def train(
    config: Config,
    resume: Resume = False,
    *,
    fork: CheckpointName | None = None,
    halt: Callable[[], str] | None = None,
    open_pool: PoolOpener = Pool,
) -> None:
    """Runs `config.train.steps` steps; with `resume`, the steps that are left after the newest complete checkpoint;
    with `fork`, those after that checkpoint of another run.

    Writes the trained model as a Hugging Face directory, run_dir/model, and the critic as run_dir/critic. Rank 0 asks
    `halt` after each step, with its evaluation, why the run is to stop: Stopped is raised if it gives a reason. Rank 0
    gets its servers from `open_pool`.
    """
    with contextlib.suppress(NothingLeft), open_parts(config, resume, open_pool, fork) as parts:
        trainer, progress = parts.trainer, parts.progress
        parts.publisher.start(progress.step, trainer.console)
        trainer.begin()  # all that a start can lack is there: from now on the run writes
        parts.evaluator.evaluate(progress)  # before the first step, or owed by a run that was stopped
        trainer.journal.timer.drain()  # the first weight sync is no step's
        while progress.step < progress.steps:
            batch = parts.rollouts.next(progress)
            parts.gpu_turns.take(TRAINING)
            mini_batches = schedule(parts, with_advantages(batch.groups, config))
            noise = progress.due(config.routing.noise_floor)
            records = progress.step + 1 in config.lab.record_steps
            updates = prepare(
                config, trainer, mini_batches, weight_version=progress.step, measures_noise=noise, records=records
            )
            for update in updates:
                measure_router_shift(trainer, update)
                apply(config, trainer, update, progress.step, batch.metrics)
            train_critic_again(config, trainer, updates)
            if records:
                write_recorded(trainer, updates, progress.step + 1)
            finish_step(parts, batch)
            parts.evaluator.evaluate(progress)
            if halt is not None:
                trainer.watch.halt_if(halt)
            trainer.checkpoint(progress.state)
        parts.gpu_turns.take(TRAINING)
        trainer.export_all()
        parts.evaluator.check_made(progress)
        trainer.end()


def with_advantages(groups: Sequence[Group], config: Config) -> list[TrainSample]:
    """Numbers the samples over all leaders, and gives each its advantage among its group's samples with a verdict.

    The advantage is 0 for a sample without a verdict, and for all if advantages need a forward pass
    (loop.experience.prepare).
    """
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


def schedule(parts: Parts, samples: Sequence[TrainSample]) -> list[MiniBatch]:
    """Cuts all leaders' samples into this rank's packed micro-batches. Collective."""
    config, trainer = parts.config, parts.trainer
    with trainer.journal.phase("schedule"):
        return distribute(
            samples,
            trainer.place,
            trainer.layout,
            mini_batches=config.train.mini_batches,
            max_tokens=config.engine.max_tokens_per_micro_batch,
            routes=parts.routes,
            tops=parts.tops,
        )


def finish_step(parts: Parts, batch: RolloutBatch) -> None:
    """Counts the step, publishes its weights, and shows it. Collective."""
    progress, trainer = parts.progress, parts.trainer
    progress.step += 1
    progress.owes_evaluation = progress.due(parts.config.eval.every)
    published = parts.publisher.publish(progress.step)
    traces = parts.routes.drain() if parts.routes else {}
    tokens = batch.metrics["rollout/tokens"]
    trainer.end_step({**published, **traces}, tokens=tokens, last=progress.step == progress.steps)
