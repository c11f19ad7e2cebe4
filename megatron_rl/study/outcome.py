"""The result of one run of a study, and its numbers from the run's lines. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rl.lab.run import read_metrics
from megatron_rl.study.stop_rules import Line, Lines
from megatron_rl.study.study_file import StudyMetric

Status = Literal["done", "stopped", "failed", "left out"]
"""left out: what the run needs cannot come; results have no line of it, but rules see it."""


@dataclass(frozen=True)
class RunOutcome:
    """One line of results.jsonl."""

    task: int
    run: str
    arm: str
    seed: int
    at: dict[str, int | float | str]
    status: Status
    """stopped: by a stop rule or an alarm; what the run had measured until then counts."""
    reason: str = ""
    """The stop rule with its numbers, or the error; `max_minutes` if a done run had no more time."""
    exit_status: int = 0
    """Status of the rank that failed first; 128 + N for signal N."""
    steps: int | None = None
    """Rollout steps that were made; None for a failed run."""
    seconds: float = 0.0
    """Duration of the last try."""
    began: float = 0.0
    """Unix time, as `ended`."""
    ended: float = 0.0
    metrics: dict[str, float | None] = field(default_factory=dict)
    """The study's metrics; None: no such line, or a value that is not finite."""
    errors: dict[str, float | None] = field(default_factory=dict)
    """Standard errors of the metrics that declare one."""
    run_dir: str = ""
    log: str = ""

    @property
    def has_values(self) -> bool:
        return self.status in ("done", "stopped")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_lines(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl and eval.jsonl, by `metrics` and `eval`; a missing file has none."""
    files = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "eval")}
    return {name: read_metrics(file) if file.is_file() else [] for name, file in files.items()}


def measure(metric: StudyMetric, lines: Lines) -> float | None:
    """The metric's number; None without a line that has it, or if a value that it needs is not finite."""
    values = [_of_line(metric, line) for line in _counted(metric, lines)]
    used = {"first": values[:1], "last": values[-1:], "last_over_first": values[:1] + values[-1:]}
    finite = [value for value in used.get(metric.reduce, values) if value is not None]
    if not values or len(finite) < len(used.get(metric.reduce, values)):
        return None
    match metric.reduce:
        case "mean":
            return statistics.fmean(finite)
        case "median":
            return statistics.median(finite)
        case "min":
            return min(finite)
        case "max":
            return max(finite)
        case "first" | "last":
            return finite[0]
        case "last_over_first":
            return finite[-1] / finite[0] if finite[0] else None


def measure_error(metric: StudyMetric, lines: Lines) -> float | None:
    """The standard error of the metric's number: that of a share p of n samples, sqrt(p (1 - p) / n).

    The prompts are the same for all arms, so only the sampling of responses counts. None if the number is no single
    evaluation's.
    """
    counted = _counted(metric, lines)
    if metric.error is None or not counted or metric.reduce not in ("first", "last"):
        return None
    line = counted[0 if metric.reduce == "first" else -1]
    share, samples = line["avg_at_k"], line["prompts"] * line["k"]
    return math.sqrt(share * (1 - share) / samples)


def _names(metric: StudyMetric) -> tuple[str, ...]:
    return (metric.name,) if isinstance(metric.name, str) else metric.name


def _counted(metric: StudyMetric, lines: Lines) -> Sequence[Line]:
    found = [line for line in lines[metric.file] if all(name in line for name in _names(metric))]
    if metric.mini_batches:
        found = [line for line in found if line["mini_batch"] in metric.mini_batches]
    if metric.last_steps is not None and found:
        first = found[-1]["step"] - metric.last_steps + 1
        found = [line for line in found if line["step"] >= first]
    return found


def _of_line(metric: StudyMetric, line: Mapping[str, Any]) -> float | None:
    values = [line[name] for name in _names(metric)]
    if None in values:
        return None
    match metric.combine:
        case None:
            return float(values[0])
        case "root_sum_squares":
            return math.hypot(*values)
        case "sum":
            return float(values[0] + values[1])
        case "difference":
            return float(values[0] - values[1])
        case "ratio":
            return values[0] / values[1] if values[1] else None
