"""Reads what a run directory says of its run: metrics as columns, configuration, and health. Writes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_rl.config.sources import flatten
from megatron_rl.errors import MissingFileError, UserError
from megatron_rl.lab.changes import ChangedKey, read_changes
from megatron_rl.lab.declared import TAGS
from megatron_rl.lab.health import Health, Line, judge
from megatron_rl.lab.run import read_metrics, read_origin
from megatron_rl.lab.run_records import RUN_FILE, read_run_id

Column = np.ndarray
"""float64 by line; NaN in a line without the metric, and if the metric was not finite."""


class ReportError(UserError):
    """A path is neither a run nor a study, or one of its files cannot be read."""


@dataclass(frozen=True)
class MetricColumns:
    """Lines of one file, by column."""

    file: str
    lines: Sequence[Line]

    @cached_property
    def steps(self) -> np.ndarray:
        """[lines] int: rollout steps."""
        return np.array([line["step"] for line in self.lines], dtype=np.int64)

    @cached_property
    def mini_batches(self) -> np.ndarray:
        """[lines] int: index of the mini-batch; 0 in files without mini-batches."""
        return np.array([line.get("mini_batch", 0) for line in self.lines], dtype=np.int64)

    @cached_property
    def places(self) -> np.ndarray:
        """[lines]: position on the axis of steps; the mini-batches of step 3 are at 3, 3 + 1/N, ..."""
        count = int(self.mini_batches.max(initial=0)) + 1
        return self.steps + self.mini_batches / count

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the metrics in any line."""
        return frozenset().union(*self.lines) - set(TAGS)

    def column(self, name: str) -> Column:
        return np.array([np.nan if (v := line.get(name)) is None else v for line in self.lines], dtype=np.float64)

    def measured(self, name: str) -> tuple[np.ndarray, Column]:
        """(places, values) of the lines in which the metric is a number."""
        values = self.column(name)
        there = np.isfinite(values)
        return self.places[there], values[there]

    def nulls(self, name: str) -> int:
        """Number of lines in which the metric was not finite."""
        return sum(name in line and line[name] is None for line in self.lines)

    def by_step(self, name: str) -> tuple[np.ndarray, Column]:
        """(steps, means over the mini-batches of each step), of the lines in which the metric is a number."""
        values = self.column(name)
        there = np.isfinite(values)
        steps, place = np.unique(self.steps[there], return_inverse=True)
        return steps, np.bincount(place, values[there]) / np.bincount(place)


@dataclass(frozen=True)
class LoadedRun:
    path: Path
    name: str
    metrics: MetricColumns
    evaluations: MetricColumns
    checkpoints: MetricColumns
    config: Mapping[str, Any]
    """The frozen configuration by dotted key, all values as text; empty if the directory has none."""
    origin: Mapping[str, Any] | None
    """The checkpoint of another run that the run was forked from, as fork.json names it."""
    changes: Sequence[ChangedKey]
    """What resumes have changed of the configuration."""
    ended: bool
    """Whether the run wrote its model, as a run does at its end."""

    @cached_property
    def health(self) -> Health:
        return judge(self.metrics.lines, self.evaluations.lines)

    @property
    def last_step(self) -> int:
        """The last step of metrics.jsonl; 0 if it has none."""
        return int(self.metrics.steps.max(initial=0))

    @property
    def planned_steps(self) -> str:
        """Steps of the configuration as text; "?" if it does not say."""
        return str(self.config.get("train.steps", self.config.get("steps", "?")))

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        done = f"{self.last_step} of {self.planned_steps} steps"
        if self.ended:
            return f"ended after {done}"
        all_made = str(self.last_step) == self.planned_steps
        return f"{done}: model not written yet" if all_made else f"{done}: in progress, or ended early"

    def tables(self) -> tuple[MetricColumns, ...]:
        return self.metrics, self.evaluations, self.checkpoints


def is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "config.yaml").is_file()


def load_run(path: Path, name: str = "") -> LoadedRun:
    """Reads the run in a directory, also one that is in progress or was written by an older version.

    `name` defaults to the directory's. Raises ReportError, MissingFileError or RunDirError.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: not there. Name the run_dir of a run.")
    if not is_run(path):
        raise MissingFileError(
            f"{path}: no run, because it has neither metrics.jsonl nor config.yaml. Name the run_dir of a run."
        )
    with reading():
        if (path / RUN_FILE).exists():
            read_run_id(path)
        return LoadedRun(
            path,
            name or path.resolve().name,
            metrics=_columns(path / "metrics.jsonl"),
            evaluations=_columns(path / "eval.jsonl"),
            checkpoints=_columns(path / "checkpoints.jsonl"),
            config=_read_config(path / "config.yaml"),
            origin=read_origin(path),
            changes=read_changes(path),
            ended=(path / "model").is_dir(),
        )


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Makes an OSError of the body, such as a directory in a file's place, a ReportError that names the file."""
    try:
        yield
    except UserError:  # some are OSErrors too
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ReportError(f"{error.filename}: cannot be read: {reason}. Restore the file.") from None


def _columns(file: Path) -> MetricColumns:
    return MetricColumns(file.name, read_metrics(file) if file.exists() else [])


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    tree = read_yaml(file)
    if not isinstance(tree, dict):
        raise ReportError(f"{file}: found {type(tree).__name__}, expected the keys of a configuration")
    return {key: value if isinstance(value, str) else str(value) for key, value in flatten(tree).items()}


def read_yaml(file: Path) -> Any:
    """The file's content with every scalar as text. Raises ReportError if it is not YAML."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ReportError(f"{file}{line}: not YAML in UTF-8 ({getattr(error, 'problem', None) or error})") from None


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Names by directory, with as many parents as it takes to tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def differing_keys(runs: Sequence[LoadedRun]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of the configuration's keys that differ between runs; run_dir always differs."""
    keys = sorted(set().union(*(run.config for run in runs)) - {"run_dir"})
    table = [(key, [str(run.config.get(key, "absent")) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]
