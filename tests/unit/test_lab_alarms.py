"""Alarms on the metrics of optimizer steps."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from megatron_rl.config.lab import Alarm
from megatron_rl.config.load import ConfigError
from megatron_rl.lab.alarms import Alarms, check_alarms


def fired(alarm: Alarm, values: list[float | None]) -> list[bool]:
    """Returns at which optimizer steps the alarm fires; None is a step without the metric."""
    alarms = Alarms([alarm])
    found = []
    for value in values:
        metrics = {} if value is None else {alarm.metric: value}
        firings, figures = alarms.check(metrics, skips=alarm.action == "skip")
        assert figures == {f"alarm/{alarm.metric}/{alarm.action}": float(bool(firings))}
        found.append(bool(firings))
    return found


def test_an_alarm_fires_only_beyond_its_bound() -> None:
    assert fired(Alarm(metric="a", above=2.0), [1.0, 2.0, 2.1, 1.9]) == [False, False, True, False]
    assert fired(Alarm(metric="a", below=2.0), [1.9, 2.0, 2.1]) == [True, False, False]
    assert fired(Alarm(metric="a", above=0.0), [0.0, 0.1]) == [False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_beyond_any_bound(value: float) -> None:
    assert fired(Alarm(metric="a", above=1e9), [value]) == fired(Alarm(metric="a", below=-1e9), [value]) == [True]


def test_an_alarm_waits_for_its_steps_in_a_row() -> None:
    alarm = Alarm(metric="a", above=0.0, steps=3)
    assert fired(alarm, [1, 1, 0, 1, 1, 1, 1]) == [False] * 5 + [True, True]
    assert fired(alarm, [1, 1, None, 1]) == [False] * 3 + [True]  # a step without the metric does not count


def test_only_the_first_firing_in_a_row_is_news() -> None:
    alarms = Alarms([Alarm(metric="a", above=0.0, steps=2)])
    news = [[f.is_first for f in alarms.check({"a": value}, skips=False)[0]] for value in (1, 1, 1, 0, 1, 1)]
    assert news == [[], [True], [False], [], [], [True]]


def test_alarms_that_skip_are_asked_before_the_step_and_the_others_after_it() -> None:
    alarms = Alarms([Alarm(metric="a", above=0.0, action=action) for action in ("warn", "skip", "stop")])
    before, _ = alarms.check({"a": 1.0}, skips=True)
    after, figures = alarms.check({"a": 1.0}, skips=False)
    assert [firing.alarm.action for firing in (*before, *after)] == ["skip", "warn", "stop"]
    assert figures == {"alarm/a/warn": 1.0, "alarm/a/stop": 1.0}


def test_a_firing_says_metric_value_and_bound() -> None:
    (firing,), _ = Alarms([Alarm(metric="ratio/max", above=10.0)]).check({"ratio/max": 12.5}, skips=False)
    assert str(firing) == "ratio/max is 12.5, above 10"
    alarms = Alarms([Alarm(metric="entropy/mean", below=0.1, steps=2)])
    alarms.check({"entropy/mean": 0.05}, skips=False)
    (firing,), _ = alarms.check({"entropy/mean": 0.04}, skips=False)
    assert str(firing) == "entropy/mean is 0.04, below 0.1 in 2 optimizer steps in a row"


@pytest.mark.parametrize("bounds", [{}, {"above": 1.0, "below": 0.0}])
def test_an_alarm_has_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="either `above` or `below`"):
        Alarm(metric="a", **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "metric", ["ratio/p99", "loss", "routing/expert_change/old_policy/live/layer_03", "rollout/truncated", "skipped"]
)
def test_an_alarm_may_name_any_metric_of_optimizer_steps(metric: str) -> None:
    check_alarms([Alarm(metric=metric, above=1.0)])


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("ratio/p9", "found 'ratio/p9', which no line of metrics.jsonl has; did you mean 'ratio/p99'?"),
        ("avg_at_k", "found 'avg_at_k', which no line of metrics.jsonl has; "),
        ("ratio", "did you mean 'ratio/"),
    ],
)
def test_an_alarm_on_a_metric_that_no_run_writes_is_an_error(metric: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_alarms([Alarm(metric="loss", above=1.0), Alarm(metric=metric, above=1.0)])
    assert str(caught.value).startswith("lab.alarms.1.metric: ")
    assert hint in str(caught.value)
