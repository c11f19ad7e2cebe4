"""Supervised fine-tuning on the same engine: it makes cold starts."""

from __future__ import annotations

import contextlib

from megatron_rl.config.schema import SftConfig
from megatron_rl.data.prompts import PromptCursor, take_indexes
from megatron_rl.data.sample import Sample
from megatron_rl.engine.distribute import TrainSample, distribute
from megatron_rl.engine.manifest import State
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.packed_losses import SftLoss
from megatron_rl.lab.run_records import Resume
from megatron_rl.loop.run_prompts import read_examples
from megatron_rl.loop.trainer import Trainer, open_trainer
from megatron_rl.ranks.collectives import together
from megatron_rl.stop import NothingLeft


def sft(config: SftConfig, resume: Resume = False, *, fork: CheckpointName | None = None) -> None:
    """Runs `config.steps` optimizer steps and leaves the model as a Hugging Face directory in run_dir/model. With
    `resume` and `fork` as in `train`."""
    with (
        contextlib.suppress(NothingLeft),
        open_trainer(config, steps=config.steps, resume=resume, fork=fork) as trainer,
    ):
        with trainer.console.starting("data", config.data.train), together(trainer.place.control):
            leads = trainer.place.leads_replica
            samples = read_examples(config, trainer.policy.arch.vocab_size) if leads else []
        state = trainer.begin()
        step = state.step if state else 0
        cursor = PromptCursor(**state.cursor) if state else PromptCursor(config.seed)
        while step < config.steps:
            chosen, cursor = take_indexes(len(samples), cursor, config.batch_size) if samples else ([], cursor)
            (mini_batch,) = distribute(
                _share(samples, chosen, trainer),
                trainer.place,
                trainer.layout,
                mini_batches=1,
                max_tokens=config.engine.max_tokens_per_micro_batch,
            )
            metrics = trainer.update(mini_batch, SftLoss(mini_batch, trainer.policy.device))
            step += 1
            trainer.log_update(step, 0, 0, metrics)
            trainer.end_step({}, tokens=metrics["tokens"], last=step == config.steps)
            trainer.checkpoint(State(step=step, cursor=cursor.as_json()))
        trainer.export_all()
        trainer.end()


def _share(samples: list[Sample], chosen: list[int], trainer: Trainer) -> list[TrainSample]:
    """This leader's examples of the batch; each is a group of its own, since a batch is one mini-batch."""
    place, dp = trainer.place, trainer.layout.dp
    return [TrainSample(i, i, samples[k], 0.0) for i, k in enumerate(chosen) if i % dp == place.dp]
