"""The study file: question, arms, metrics, stop rules and decision rule, typed and frozen. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megatron_rl.config.bounds import Frozen, NonNegativeInt, Positive, PositiveInt
from megatron_rl.config.load import MAX_PROBLEMS, raise_all
from megatron_rl.config.sources import ConfigError, flatten, shown
from megatron_rl.config.yaml12 import MAX_BYTES, YamlError, read_yaml
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.study.decision_rules import Rule, rules_within
from megatron_rl.study.stop_rules import StopRule

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
"""What an arm may be called; directories and files are named after it."""
RESERVED = ("run_dir", "seed", "rollout.replay_from")
"""Keys of the configuration that the study sets itself."""
Text = Annotated[str, Field(min_length=1)]
Coordinate = int | float | str


class Replay(Frozen):
    """Training on the rollouts that a run of another arm has saved."""

    source: str = Field(alias="from")
    """The other arm."""
    seed: NonNegativeInt | None = None
    """Seed of its run; null: the same as this run's."""


class Start(Frozen):
    """Training from the model that a run of another arm has made."""

    source: str = Field(alias="from")
    """The other arm."""
    seed: NonNegativeInt | None = None
    """Seed of its run; null: the same as this run's."""
    graft: tuple[PolicyKind, ...] = ()
    """Kinds of weights that are taken from this arm's own model.path instead."""


class StudyArm(Frozen):
    """One configuration, or with `grid` one for each point of a grid, whose factors the arm's name and values hold as
    {factor}."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Values of the configuration, in its sections."""
    base: Path | None = None
    """Configuration that the arm changes; null: the study's."""
    seeds: tuple[NonNegativeInt, ...] | None = None
    ranks: PositiveInt | None = None
    replay: Replay | None = None
    start: Start | None = None
    at: dict[str, Coordinate] = Field(default_factory=dict)
    """The arm's coordinates, by which rules find it; a grid adds its factors."""
    grid: dict[str, Annotated[tuple[Coordinate, ...], Field(min_length=1)]] = Field(default_factory=dict)


class StudyMetric(Frozen):
    """A number of a run, from the lines of one of its files."""

    file: Literal["metrics", "eval"] = "metrics"
    """metrics.jsonl has a line for each optimizer step, eval.jsonl one for each evaluation."""
    name: str | tuple[str, str]
    """A metric, or two that `combine` makes one number of, line by line."""
    combine: Literal["root_sum_squares", "ratio", "difference", "sum"] | None = None
    mini_batches: tuple[NonNegativeInt, ...] = ()
    """Mini-batches, from 0, whose lines count; none: all lines."""
    last_steps: PositiveInt | None = None
    """Only the lines of so many last steps count; null: all."""
    reduce: Literal["mean", "median", "min", "max", "first", "last", "last_over_first"] = "mean"
    """Makes one number of the lines."""
    error: Literal["binomial"] | None = None
    """binomial: the number is a share of right answers, whose standard error follows from the prompts and samples of
    its evaluation."""


class StudyBudget(Frozen):
    steps: PositiveInt | None = None
    """Rollout steps of each run; null: train.steps of its configuration."""
    minutes: Positive | None = None
    """Minutes after which a run ends, however far it is."""


class StudyFile(Frozen):
    question: Text
    hypothesis: Text
    source: Text
    """Where the hypothesis comes from: a paper, an issue, an earlier run."""
    directory: Path
    """Directory of the study, which is made; relative to the current directory, as in a configuration."""
    base: Path
    """Configuration that every arm changes; relative to the study file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values of the configuration for all arms, in its sections."""
    ranks: PositiveInt = 1
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    budget: StudyBudget = StudyBudget()
    arms: Annotated[dict[str, StudyArm], Field(min_length=1)]
    metrics: dict[str, StudyMetric] = Field(default_factory=dict)
    stops: tuple[StopRule, ...] = ()
    """Each of them ends a run early."""
    rule: Rule
    """Decides the question."""
    also: dict[str, Rule] = Field(default_factory=dict)
    """Further numbers and verdicts by name; they decide nothing."""
    keep: tuple[Literal["checkpoints", "model"], ...] = ("model",)
    """What stays of a run that has ended, besides its records, metrics and rollouts."""

    @property
    def rules(self) -> Iterator[tuple[str, Rule]]:
        """Each rule with its key; also those inside of `all` and `any`."""
        yield from rules_within("rule", self.rule)
        for name, rule in self.also.items():
            yield from rules_within(f"also.{name}", rule)


def read_study(path: Path) -> bytes:
    """The bytes of a study file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a study file (docs/studies.md)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def load_study(path: Path) -> StudyFile:
    """Raises ConfigError with all mistakes of the file: one line each, with its place, what was found and expected."""
    problems: list[str] = []
    try:
        text = read_study(path).decode("utf-8-sig")
        values, places = read_yaml(text, lambda line: f"{path}:{line}", problems)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {shown(values)}, expected keys and values")
    try:
        study = StudyFile.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += [_explain(mistake, values, places, path) for mistake in error.errors()[: MAX_PROBLEMS + 1]]
        raise_all(problems)
        raise
    raise_all([*problems, *(f"{_place(key, places, path)}: {key}: {what}" for key, what in _mistakes(study))])
    return study


def _explain(mistake: Any, values: Any, places: Mapping[str, str], path: Path) -> str:
    parts: list[str] = []
    here = values
    for part in map(str, mistake["loc"]):
        if isinstance(here, dict) and part not in here and here.get("kind") == part:
            continue  # pydantic puts a rule's kind after its key
        parts.append(part)
        here = here.get(part) if isinstance(here, dict) else _item(here, part)
    key = ".".join(parts)
    where = f"{_place(key, places, path)}: {key}"
    if mistake["type"] == "missing":
        return f"{where}: not set, and it has no default (docs/studies.md)"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: no such key (docs/studies.md)"
    if mistake["type"].startswith("union_tag"):
        return f"{where}: found {shown(mistake['input'])}, expected a `kind`: {mistake['ctx'].get('expected_tags', '')}"
    expected = mistake["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: found {shown(mistake['input'])}, expected {expected}"


def _item(here: object, part: str) -> object:
    return here[int(part)] if isinstance(here, list) and part.isdecimal() and int(part) < len(here) else None


def _place(key: str, places: Mapping[str, str], path: Path) -> str:
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, str(path))


# ---- what the keys say together --------------------------------------------------------------------------------


def _mistakes(study: StudyFile) -> Iterator[tuple[str, str]]:
    """Yields the key and what is wrong with it. What rules say of arms is checked with the plan, which has grids."""
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds", f"found {list(study.seeds)}, expected each seed once"
    yield from (("set", f"{key} is set by the study itself; drop it") for key in RESERVED if key in flatten(study.set))
    for name, arm in study.arms.items():
        for key in RESERVED:
            if key in flatten(arm.set):
                instead = {"seed": "`seeds`", "run_dir": "`directory`"}.get(key, "`replay`")
                yield f"arms.{name}.set", f"{key} is set by the study itself; use {instead}"
        if arm.replay is not None and arm.start is not None:
            yield f"arms.{name}.start", "an arm has `replay` or `start`, not both; drop one of them"
        if both := sorted(arm.at.keys() & arm.grid.keys()):
            yield f"arms.{name}.at", f"{both[0]} is a factor of the arm's grid too; drop one of them"
        if arm.seeds is not None and (not arm.seeds or len(set(arm.seeds)) < len(arm.seeds)):
            yield f"arms.{name}.seeds", f"found {list(arm.seeds)}, expected at least one seed, each once"
    for name, metric in study.metrics.items():
        if (metric.combine is None) != isinstance(metric.name, str):
            yield f"metrics.{name}", "`combine` is for a `name` of two metrics, which needs it"
        if metric.mini_batches and metric.file == "eval":
            yield f"metrics.{name}.mini_batches", "lines of eval.jsonl have no mini-batch; drop it"
        if metric.error and (metric.file, metric.name) != ("eval", "avg_at_k"):
            yield f"metrics.{name}.error", "binomial is the error of `file: eval`, `name: avg_at_k` alone"
        elif metric.error and metric.reduce not in ("first", "last"):
            yield f"metrics.{name}.error", f"one evaluation has it, and reduce is {metric.reduce}; take first or last"
        for each in (metric.name,) if isinstance(metric.name, str) else metric.name:
            yield from _unknown(f"metrics.{name}.name", metric.file, each)
    for number, stop in enumerate(study.stops):
        yield from _unknown(f"stops.{number}.name", stop.file, stop.name)
    for key, rule in study.rules:
        if len(set(rule.arms)) < len(rule.arms):
            yield key, f"{rule.arms[0]!r} is compared with itself; name another arm"
        for metric_name in rule.metrics:
            if metric_name not in study.metrics:
                known = ", ".join(study.metrics) or "none"
                yield key, f"no metric is called {metric_name!r}; `metrics` declares: {known}"


def _unknown(key: str, file: str, name: str) -> Iterator[tuple[str, str]]:
    """A metric that no line has: its number would be missing in every run, and its rule would never stop one."""
    lines = f"{file}.jsonl"
    if DECLARATION.find(lines, name) is None:
        close = DECLARATION.nearest(lines, name)
        hint = f"did you mean {close!r}?" if close else "docs/metrics.md lists all metrics"
        yield key, f"found {name!r}, which no line of {lines} has; {hint}"
