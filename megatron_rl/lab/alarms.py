"""Early warning: alarms on the metrics of optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.config.lab import Alarm
from megatron_rl.config.load import ConfigError
from megatron_rl.lab.declared_all import DECLARATION

FILE = "metrics.jsonl"


def check_alarms(alarms: Sequence[Alarm]) -> None:
    """Raises ConfigError if a run cannot write the metric of an alarm, which would then never fire."""
    for number, alarm in enumerate(alarms):
        if DECLARATION.find(FILE, alarm.metric) is None:
            close = DECLARATION.nearest(FILE, alarm.metric)
            raise ConfigError(
                f"lab.alarms.{number}.metric: found {alarm.metric!r}, which no line of {FILE} has"
                + (f"; did you mean {close!r}?" if close else "; docs/metrics.md lists all metrics")
            )


@dataclass(frozen=True)
class Firing:
    alarm: Alarm
    value: float
    is_first: bool
    """Whether it did not fire in the step before."""

    def __str__(self) -> str:
        alarm = self.alarm
        bound = f"above {alarm.above:g}" if alarm.above is not None else f"below {alarm.below:g}"
        rows = f" in {alarm.steps} optimizer steps in a row" if alarm.steps > 1 else ""
        return f"{alarm.metric} is {self.value:g}, {bound}{rows}"


class Alarms:
    """Counts for each alarm the optimizer steps in a row in which its metric was beyond the bound.

    A resumed run begins to count again. The counts are the same on every rank if the metrics are.
    """

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self._counts = dict.fromkeys(alarms, 0)

    def check(self, metrics: Mapping[str, float], *, skips: bool) -> tuple[list[Firing], dict[str, float]]:
        """Counts one optimizer step for the alarms that skip steps, or with `skips` False for the others.

        Returns the alarms that fire, and their figures for the journal. An alarm whose metric this step does not have
        keeps its count and does not fire.
        """
        fired: list[Firing] = []
        figures: dict[str, float] = {}
        for alarm, count in self._counts.items():
            if (alarm.action == "skip") != skips:
                continue
            name = f"alarm/{alarm.metric}/{alarm.action}"
            figures.setdefault(name, 0.0)
            value = metrics.get(alarm.metric)
            if value is None:
                continue
            self._counts[alarm] = count + 1 if alarm.are_passed_by(value) else 0
            if self._counts[alarm] >= alarm.steps:
                figures[name] = 1.0
                fired.append(Firing(alarm, value, self._counts[alarm] == alarm.steps))
        return fired, figures
