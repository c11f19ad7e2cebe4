"""Sends the lines of a run to Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.lab import WandbConfig
from megatron_rl.config.load import ConfigError
from megatron_rl.lab.sinks import Line

logger = logging.getLogger(__name__)

BY_ROLLOUT_STEP = "step/"
"""What the names of a rollout step's line begin with, since W&B plots a name over one axis only."""


def check_wandb(config: WandbConfig | None) -> None:
    """Raises ConfigError if the package or the account's key is missing. Does not ask the network."""
    if config is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("lab.wandb: the package wandb is not installed; install the extra [wandb], or remove the key")
    if os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login(timeout=1)  # it would ask a terminal for the key, and wait
        except wandb.Error as error:
            raise ConfigError(
                f"lab.wandb: {error} Or set WANDB_API_KEY, or keep the run on this machine with WANDB_MODE=offline"
            ) from error


class WandbSink:
    """Plots over optimizer steps, and under step/ and eval/ over rollout steps, in one W&B run for all starts of a run.
    If W&B fails, the run goes on without it."""

    what = "Weights & Biases"

    def __init__(self, config: WandbConfig, run_dir: Path, run_id: str, config_yaml: str) -> None:
        """Begins or resumes the W&B run `run_id`; its files go into `run_dir`. Raises ConfigError if W&B refuses."""
        import wandb

        self.directory = run_dir
        try:
            self._run: Any = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                dir=run_dir,
                config=yaml.safe_load(config_yaml),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(f"lab.wandb: {error}") from error
        # W&B's own counter only grows, but a resumed run repeats the steps after its checkpoint.
        self._run.define_metric("*", step_metric="optimizer_step")
        for prefix in (BY_ROLLOUT_STEP, "eval/"):
            self._run.define_metric(f"{prefix}*", step_metric="rollout_step")

    def write(self, line: Line) -> None:
        if line.file != "checkpoints":
            prefix = BY_ROLLOUT_STEP if line.file == "steps" else ""
            values = {prefix + name: value for name, value in line.named().items()}
            self._try("log", {**values, "optimizer_step": line.optimizer_steps, "rollout_step": line.tags["step"]})

    def sync(self) -> None: ...

    def close(self) -> None:
        self._try("finish")

    def _try(self, method: str, *arguments: Any) -> None:
        import wandb

        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments)
        except wandb.Error as error:
            logger.warning("Weights & Biases takes no more lines of this run: %s", error)
            self._run = None
