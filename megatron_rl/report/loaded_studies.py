"""Reads the directory of a study: its question, its plan, the results so far, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.config.sources import flatten
from megatron_rl.errors import MissingFileError
from megatron_rl.report.loaded_runs import LoadedRun, ReportError, is_run, load_run, read_yaml, reading


@dataclass(frozen=True)
class StudyRun:
    """A run of the plan, and what is known of it."""

    name: str
    arm: str
    seed: int
    status: str
    """done, stopped, failed, left, or left out: what the run needs cannot come."""
    reason: str
    metrics: Mapping[str, float | None]
    """The study's own metrics of this run; empty without a result."""
    errors: Mapping[str, float | None]
    """Standard errors of those metrics that have one."""
    run: LoadedRun | None
    """None if the run has no directory yet, or none that can be read."""


@dataclass(frozen=True)
class LoadedStudy:
    path: Path
    name: str
    question: str
    hypothesis: str
    source: str
    rule: Sequence[tuple[str, str]]
    """(dotted key, value) of the rule."""
    verdict: str
    text: str
    numbers: Sequence[tuple[str, str]]
    also: Sequence[tuple[str, str, str]]
    """(name, verdict, text) of further rules, which do not decide."""
    measures: Mapping[str, tuple[str, Sequence[str], str]]
    """The study's own metrics: (file, names in its lines, what it divides by what, or "") of each."""
    runs: Sequence[StudyRun]

    @property
    def arms(self) -> dict[str, list[LoadedRun]]:
        """Runs with metrics by arm, in the order of the plan."""
        found: dict[str, list[LoadedRun]] = {}
        for each in self.runs:
            if each.run is not None and each.run.metrics.lines:
                found.setdefault(each.arm, []).append(each.run)
        return found

    @property
    def stopped(self) -> frozenset[str]:
        """Names of the runs that stopped early."""
        return frozenset(each.name for each in self.runs if each.status == "stopped")

    @property
    def counts(self) -> dict[str, int]:
        return {status: sum(each.status == status for each in self.runs) for status in STATUSES}


STATUSES = ("done", "stopped", "failed", "left", "left out")


def is_study(path: Path) -> bool:
    return (path / "plan.json").is_file()


def load_study(path: Path) -> LoadedStudy:
    """Reads a study that ended or that is in progress. Raises ReportError or MissingFileError."""
    with reading():
        return _load_study(path)


def _load_study(path: Path) -> LoadedStudy:
    file = path / "study.yaml"
    if not file.exists():
        raise MissingFileError(f"{path}: plan.json without study.yaml, so the question is not known. Restore the file.")
    asked = read_yaml(file)
    if not isinstance(asked, dict):
        raise ReportError(f"{file}: found {type(asked).__name__}, expected the keys of a study")
    decided = _read_json(path / "verdict.json", dict) if (path / "verdict.json").exists() else {}
    plan = _read_json(path / "plan.json", list)
    return LoadedStudy(
        path,
        path.resolve().name,
        question=str(asked.get("question", "")),
        hypothesis=str(asked.get("hypothesis", "")),
        source=str(asked.get("source", "")),
        rule=[(key, _shown(value)) for key, value in flatten(asked.get("rule", {})).items()],
        verdict=str(decided.get("verdict", "incomplete")),
        text=str(decided.get("text", "No run of the study has ended yet.")),
        numbers=[(key, _shown(value)) for key, value in flatten(decided.get("numbers") or {}).items() if key],
        also=[(name, str(e.get("verdict")), str(e.get("text"))) for name, e in (decided.get("also") or {}).items()],
        measures={name: _measure(each) for name, each in (asked.get("metrics") or {}).items()},
        runs=[_load_run_of(path, entry, "left out" if decided.get("left") == 0 else "left") for entry in plan],
    )


def _measure(asked: Any) -> tuple[str, Sequence[str], str]:
    """What LoadedStudy.measures has of a metric that study.yaml declares."""
    if not isinstance(asked, dict):
        return "metrics.jsonl", [], ""
    given = asked.get("name", [])
    names = [given] if isinstance(given, str) else [str(name) for name in given]
    file = "eval.jsonl" if asked.get("file") == "eval" else "metrics.jsonl"
    ratio = " / ".join(names) if asked.get("combine") == "ratio" else ""
    return file, names, "last / first" if asked.get("reduce") == "last_over_first" else ratio


def _load_run_of(path: Path, entry: Any, missing: str) -> StudyRun:
    try:
        name, arm, seed = str(entry["run"]), str(entry["arm"]), int(entry["seed"])
        directory = path / str(entry["run_dir"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path / 'plan.json'}: expected runs with run, arm, seed and run_dir; found {entry!r:.80}"
        ) from error
    file = path / "results" / f"{name}.json"
    result = _read_json(file, dict) if file.exists() else {}
    run = load_run(directory, name) if is_run(directory) else None
    status, reason = str(result.get("status", missing)), str(result.get("reason", ""))
    metrics, errors = result.get("metrics") or {}, result.get("errors") or {}
    return StudyRun(name, arm, seed, status, reason, metrics, errors, run)


def _read_json(file: Path, kind: type) -> Any:
    try:
        content = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"{file}: not there; the study's directory is not whole") from None
    except orjson.JSONDecodeError as error:
        raise ReportError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise ReportError(f"{file}: found {type(content).__name__}, expected {kind.__name__}")
    return content


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
