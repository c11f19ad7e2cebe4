"""Held-out evaluation during a run."""

from __future__ import annotations

import contextlib

import orjson

from megatron_rl.config.schema import EvalConfig
from megatron_rl.data.prompts import PromptDataset
from megatron_rl.loop.environment import Environment
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import broadcast_bytes
from megatron_rl.rollout.evaluate import evaluation
from megatron_rl.stop import Interrupted, Stopped


class Evaluator:
    """Rank 0 evaluates; the other ranks go on and wait for it at the next collective."""

    def __init__(
        self, config: EvalConfig, trainer: Trainer, environment: Environment | None, heldout: PromptDataset | None
    ) -> None:
        """Without `heldout`, as on ranks other than 0, nothing is evaluated."""
        self._config = config
        self._trainer = trainer
        self._environment = environment
        self._heldout = heldout

    def evaluate(self, progress: Progress) -> None:
        """Makes the evaluation that is owed, if any. A run that stops leaves it to its resume."""
        if progress.owes_evaluation and not self._trainer.watch.stopping:
            with contextlib.suppress(Interrupted):
                self._evaluate(progress.step)
                progress.owes_evaluation = False

    def check_made(self, progress: Progress) -> None:
        """Raises Stopped, on every rank, if a signal prevented the evaluation after the last step. Collective."""
        owed = broadcast_bytes(orjson.dumps(progress.owes_evaluation), self._trainer.place.control)
        if orjson.loads(owed):
            raise Stopped("stopped before the evaluation after the last step; --resume makes it. The model is written")

    def _evaluate(self, step: int) -> None:
        if self._heldout is None or self._environment is None:
            return
        config, trainer = self._config, self._trainer
        count = min(len(self._heldout), config.prompts or len(self._heldout))
        prompts = [(i, self._heldout[i]) for i in range(count)]
        with trainer.journal.phase("evaluation"):
            groups = self._environment.evaluate(prompts, samples=config.samples, temperature=config.temperature)
        report = evaluation(groups) | trainer.journal.timer.take("evaluation")
        trainer.journal.log_evaluation(step, step, report)
