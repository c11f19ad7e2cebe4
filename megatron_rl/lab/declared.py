"""Defines what the declaration of a metric is, and finds the declaration of a name that a run wrote.

Every metric of metrics.jsonl, eval.jsonl and checkpoints.jsonl is declared once, in declared_updates.py,
declared_routing.py or declared_rollouts.py. The dictionaries of lab/metrics.py, docs/metrics.md, the rules of
lab/health.py and reports read the declaration. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.lab.metric_kinds import LAYER, Kind

TAGS = ("step", "mini_batch", "weight_version", "time")
"""Keys of a line that are no metrics."""
NUMBER: dict[str, str] = {r"\d+": ""}
"""The values of a field that holds any number."""
METRIC: dict[str, str] = {r".+": ""}
"""The values of a field that holds the name of another metric."""
OPEN = (NUMBER, METRIC)


@dataclass(frozen=True)
class Healthy:
    """Values that a run without a fault has, both bounds included; None is no bound."""

    low: float | None
    high: float | None
    source: str
    """Where the range comes from."""


@dataclass(frozen=True)
class DeclaredMetric:
    """One metric, or one pattern such as `kl/{pair}/{estimate}`."""

    name: str
    kind: Kind
    unit: str
    """Unit of the number: nat, token, s, ...; 1 if it has none."""
    meaning: str
    """One sentence, in which `{field}` stands for what the field's value means."""
    source: str = ""
    """Paper and equation, or empty if the meaning is the definition."""
    healthy: Healthy | None = None
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What each value of each field in `name` means. Those of OPEN are a regular expression."""

    def names(self) -> Iterator[str]:
        """Yields the names that the pattern stands for, in the order of its fields. Its fields must be closed."""
        for values in itertools.product(*self.fields.values()):
            yield self.name.format(**dict(zip(self.fields, values, strict=True)))

    def explain(self, values: Mapping[str, str]) -> str:
        """Returns the meaning with the meanings of these field values in it."""
        return self.meaning.format(**{name: self.fields[name].get(v) or v for name, v in values.items()})


@dataclass(frozen=True)
class DeclaredTable:
    """Metrics that one part of a run writes into one file."""

    title: str
    file: str
    prefix: str
    """Stands before the names of `metrics` in the file."""
    metrics: Sequence[DeclaredMetric]
    note: str = ""
    """Further sentences for docs/metrics.md."""

    def kinds(self, *, only: Sequence[str] = ()) -> dict[str, Kind]:
        """Kinds of the metrics that an accumulator keeps, by name without prefix; `only` these declarations, if any."""
        return {
            name: metric.kind
            for metric in self.metrics
            if metric.kind not in (Kind.VALUE, Kind.LAYERS) and (not only or metric.name in only)
            for name in metric.names()
        }


@dataclass(frozen=True)
class WrittenName:
    """A name in a line, with its declaration: `kl/rollout_old/k3`, `ratio/p99`, `routing/entropy/layer_03`."""

    table: DeclaredTable
    metric: DeclaredMetric
    values: Mapping[str, str]
    """Values of the pattern's fields."""
    statistic: str
    """What follows the metric's name, such as p99 or layer_03; empty for a metric without statistics."""

    @property
    def meaning(self) -> str:
        return self.metric.explain(self.values)

    @property
    def layer(self) -> int | None:
        """Global number of the layer; None for a number that is not of one layer."""
        return int(self.statistic.removeprefix("layer_")) if self.statistic.startswith("layer_") else None


class Declaration:
    """All tables, with a search by written name."""

    def __init__(self, tables: Sequence[DeclaredTable]) -> None:
        """Raises ValueError if two declarations of one file could have the same name."""
        self.tables = tuple(tables)
        self._exact: dict[tuple[str, str], WrittenName] = {}
        self._patterns: list[tuple[str, re.Pattern[str], DeclaredTable, DeclaredMetric]] = []
        for table in tables:
            for metric in table.metrics:
                self._add(table, metric)

    def _add(self, table: DeclaredTable, metric: DeclaredMetric) -> None:
        statistics = metric.kind.statistics or ("",)
        closed = all(values not in OPEN for values in metric.fields.values()) and LAYER not in statistics
        if not closed:
            self._patterns.append((table.file, _pattern(table, metric), table, metric))
            return
        for values in itertools.product(*metric.fields.values()):
            fields = dict(zip(metric.fields, values, strict=True))
            name = table.prefix + metric.name.format(**fields)
            for statistic in statistics:
                key = table.file, f"{name}/{statistic}" if statistic else name
                if key in self._exact:
                    raise ValueError(f"{key[1]} of {key[0]} is declared twice")
                self._exact[key] = WrittenName(table, metric, fields, statistic)

    def nearest(self, file: str, name: str) -> str | None:
        """Returns the name in lines of `file` that is almost `name`, if any."""
        close = difflib.get_close_matches(name, [written for where, written in self._exact if where == file], n=1)
        return close[0] if close else None

    def find(self, file: str, name: str) -> WrittenName | None:
        """Returns the declaration of a name in a line of `file`, such as metrics.jsonl; None if there is none."""
        if found := self._exact.get((file, name)):
            return found
        for where, pattern, table, metric in self._patterns:
            if where == file and (match := pattern.fullmatch(name)):
                values = match.groupdict()
                statistic = values.pop("statistic", "")
                return WrittenName(table, metric, values, statistic)
        return None


def _pattern(table: DeclaredTable, metric: DeclaredMetric) -> re.Pattern[str]:
    text = re.escape(table.prefix)
    for part in re.split(r"(\{\w+\})", metric.name):
        if part.startswith("{"):
            values = metric.fields[part[1:-1]]
            text += f"(?P<{part[1:-1]}>{'|'.join(v if values in OPEN else re.escape(v) for v in values)})"
        else:
            text += re.escape(part)
    if statistics := metric.kind.statistics:
        choices = [r"layer_\d{2,}" if each == LAYER else re.escape(each) for each in statistics]
        text += f"/(?P<statistic>{'|'.join(choices)})"
    return re.compile(text)
