"""TRL's trainer in benchmarks/versus_trl.py: GRPO on the demo's prompts, step by step, as it is granted.

    TRL-PYTHON benchmarks/versus/trl_grpo.py JOB.json

It runs in TRL's own environment. A step here is a batch of responses and the optimizer steps on it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from versus.turns import Turns

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.arithmetic import verify_arithmetic


def rewards(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The demo's verifier."""
    return [
        verify_arithmetic(Prompt("", "", (), right, "arithmetic"), completion).reward
        for completion, right in zip(completions, answer, strict=True)
    ]


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that notes the seconds of its phases."""

    seconds: dict[str, float]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _generate(self, *args: Any, **options: Any) -> Any:
        with self.phase("generation"):
            return super()._generate(*args, **options)

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():  # within the update
            return super()._get_per_token_logps_and_entropies(*args, **options)
        with self.phase("old log-probs"):
            return super()._get_per_token_logps_and_entropies(*args, **options)

    def _prepare_inputs(self, *args: Any) -> Any:
        with self.phase("prepared"):
            return super()._prepare_inputs(*args)


class InTurn(TrainerCallback):
    """Tells of each step, and waits for the next."""

    def __init__(self, turns: Turns, mini_batches: int) -> None:
        self.turns = turns
        self.mini_batches = mini_batches
        self.trainer: TimedTrainer
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.mini_batches == 0:
            whole, seconds = time.perf_counter() - self.began, self.trainer.seconds
            prepared = seconds.pop("prepared")
            seconds["rewards and padding"] = prepared - sum(seconds.values())
            seconds["update"] = whole - prepared
            self.turns.step_done({"seconds": seconds})
            self._begin()

    def _begin(self) -> None:
        self.trainer.seconds = {}
        self.began = time.perf_counter()


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    settings = job["settings"]
    config = GRPOConfig(
        output_dir=str(Path(job["directory"]) / "trainer"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "experts_implementation": job["experts"],
        },
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=settings["steps_per_generation"],
        shuffle_dataset=False,  # the prompts come in our order
        top_k=0,
        **settings,
    )
    in_turn = InTurn(Turns.within(Path(job["directory"])), settings["steps_per_generation"])
    trainer = TimedTrainer(
        model=job["model"],
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(job["prompts"]),
        callbacks=[in_turn],
    )
    in_turn.trainer = trainer
    trainer.train()
    trainer.save_model(job["trained"])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]))
