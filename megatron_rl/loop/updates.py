"""The optimizer steps of a step: one mini-batch each, the policy's and the critic's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.config.schema import Config
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_losses import PolicyLoss, ValueLoss
from megatron_rl.loop.trainer import Trainer
from megatron_rl.routing.modes import MiniBatchRouting


@dataclass(frozen=True)
class Update:
    """One mini-batch, and what its optimizer steps are to do."""

    mini_batch: MiniBatch
    loss: PolicyLoss
    routing: MiniBatchRouting | None
    value_loss: ValueLoss | None


def apply(config: Config, trainer: Trainer, update: Update, step: int, rollout: Mapping[str, float]) -> None:
    """Makes the optimizer steps of one mini-batch and logs their line. `step` counts the rollout steps that are done;
    `rollout` are the metrics of the rollout batch, which the first mini-batch's line has. Collective.

    Raises NonFiniteGradientError, on every rank, if too many optimizer steps were skipped.
    """
    mini_batch, critic = update.mini_batch, config.critic
    metrics = dict(rollout) if mini_batch.index == 0 else {}
    if critic is None or step >= critic.warmup_steps:
        metrics |= trainer.update(mini_batch, update.loss, update.routing)
    if update.value_loss is not None:
        metrics |= trainer.update_critic(mini_batch, update.value_loss)
    trainer.log_update(step + 1, mini_batch.index, step, metrics)


def train_critic_again(config: Config, trainer: Trainer, updates: Sequence[Update]) -> None:
    """Makes the critic's passes over the rollout batch after the first. Collective.

    The critic's metrics are the first pass's, on responses that it had not been trained on; of these passes the line of
    the last optimizer step has the largest gradient norm and the skipped steps, under critic/later/.
    """
    later = [] if config.critic is None else list(updates) * (config.critic.epochs - 1)
    results = []
    for update in later:
        assert update.value_loss is not None
        results.append(trainer.step_critic(update.mini_batch, update.value_loss))
        norms = [result.grad_norm for result in results if not result.skipped]
        figures = {"critic/later/grad_norm/max": max(norms)} if norms else {}
        trainer.journal.add({**figures, "critic/later/skipped": float(len(results) - len(norms))})
        trainer.check_skipped()
