"""Writes the values of each token of a step that lab.record_steps names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.lab.token_records import token_file, write_tokens
from megatron_rl.loop.trainer import Trainer
from megatron_rl.loop.updates import Update
from megatron_rl.routing.by_token import expert_changes


def write_recorded(trainer: Trainer, updates: Sequence[Update], step: int) -> None:
    """Writes a file for each data-parallel replica, after the step's updates; none if the policy had no update.

    The updates must have been prepared to record. Raises a UserError, on every rank, if one could not write.
    Collective.
    """
    parts = [part for update in updates for part in _columns(trainer, update, step)]
    file = token_file(trainer.run.tokens, step, trainer.place.dp)
    with trainer.writing(f"the token values of step {step}", file):
        if parts:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            write_tokens(file, columns, replicas=trainer.layout.dp)


def _columns(trainer: Trainer, update: Update, step: int) -> list[dict[str, np.ndarray]]:
    """The columns of each micro-batch; [] on ranks that do not speak for the last pipeline stage. Collective over a
    replica."""
    batches, changes = update.mini_batch.micro_batches, {}
    if update.routing is not None:
        layers = len(trainer.policy.arch.moe_layers)
        changes = expert_changes(update.routing.stats, batches, layers, trainer.layout, trainer.place)
    found = []
    for number, values in sorted(update.loss.token_values.items()):
        count = len(values.positions)
        place = {"step": np.full(count, step), "mini_batch": np.full(count, update.mini_batch.index)}
        experts = {
            f"expert_change/{pair}": each[number].numpy()[values.positions] for pair, each in sorted(changes.items())
        }
        found.append(place | values.columns | experts)
    return found
