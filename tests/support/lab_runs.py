"""Starts, logs to and reads run directories of a made-up configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.lab.changes import read_changes
from megatron_rl.lab.console import Console
from megatron_rl.lab.journal import Journal
from megatron_rl.lab.run import RunDir, read_metrics
from megatron_rl.lab.run_records import Resume

CONFIG = {
    "merged_presets": ["gspo"],
    "run_dir": "runs/a",
    "seed": 7,
    "optim": {"lr": 1e-6, "betas": [0.9, 0.95]},
    "train": {"steps": 10, "mini_batches": 2},
    "eval": {"every": 0},
    "rollout": {"group_size": 8, "dynamic_sampling": {"max_refills": 8}, "servers": {"urls": [], "launch": 1}},
}


def changed(**dotted: object) -> str:
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in dotted.items():
        *above, last = key.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return yaml.safe_dump(config)


@dataclass(frozen=True)
class Started:
    """A run directory and its journal, as on rank 0."""

    run: RunDir
    journal: Journal

    def log(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        self.journal.log_update(step, mini_batch, weight_version, metrics)
        self.journal.flush()

    def close(self) -> None:
        self.journal.close()
        self.run.close()


def start(path: Path, config: str | None = None, *, resume: Resume = False, last_step: int = 0) -> Started:
    run = RunDir.open(path, config or changed(), resume)
    journal = Journal(Console(10, shows=False))
    journal.open(run.begin(last_step), run.optimizer_steps)
    return Started(run, journal)


def start_and_end(
    path: Path, config: str | None = None, *, resume: Resume = False, last_step: int = 9
) -> list[tuple[int, str, object, object]]:
    """Returns what changes.jsonl then says, without times."""
    start(path, config, resume=resume, last_step=last_step).close()
    return [(each.step, each.key, each.old, each.new) for each in read_changes(path)]


def log_steps(started: Started, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for mini_batch in range(2):
            started.log(step, mini_batch, step - 1, {"loss": step + mini_batch / 10})
        started.journal.log_evaluation(step, step, {"accuracy": step / 10})
        started.journal.log_checkpoint(step, {"time/checkpoint": step / 2})


def without_time(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(path)]


def events(path: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(path / "tensorboard"))
    reader.Reload()
    return [(event.step, round(event.value, 4)) for event in reader.Scalars(tag)]
