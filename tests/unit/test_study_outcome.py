"""A run's numbers, and its stop rules, from its lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_rl.study.board import time_left
from megatron_rl.study.outcome import RunOutcome, measure, measure_error, read_lines
from megatron_rl.study.planning import PlannedRun
from megatron_rl.study.stop_rules import StopRule, stop_reason
from megatron_rl.study.study_file import StudyMetric

STOPS: TypeAdapter[StopRule] = TypeAdapter(StopRule)
LINES: dict[str, list[dict[str, Any]]] = {
    "metrics": [
        {"step": 1, "mini_batch": 0, "a": 4.0, "b": 3.0, "rollout/x": 0.1},
        {"step": 1, "mini_batch": 1, "a": 6.0, "b": 8.0},
        {"step": 2, "mini_batch": 0, "a": 1.0, "b": 0.0},
        {"step": 2, "mini_batch": 1, "a": 5.0, "b": 12.0, "c": None},
    ],
    "eval": [
        {"step": 0, "avg_at_k": 0.4, "prompts": 256.0, "k": 4.0},
        {"step": 2, "avg_at_k": 0.1, "prompts": 256.0, "k": 4.0},
    ],
}


def value(**keys: Any) -> float | None:
    return measure(StudyMetric(**keys), LINES)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", 4.0),
        ("median", 4.5),
        ("min", 1.0),
        ("max", 6.0),
        ("first", 4.0),
        ("last", 5.0),
        ("last_over_first", 1.25),
    ],
)
def test_lines_are_reduced_to_one_number(reduce: str, expected: float) -> None:
    assert value(name="a", reduce=reduce) == expected


def test_two_metrics_are_combined_line_by_line() -> None:
    pair = ("a", "b")
    assert value(name=pair, combine="root_sum_squares", last_steps=1, mini_batches=(1,)) == 13.0
    assert value(name=pair, combine="sum", reduce="last") == 17.0
    assert value(name=pair, combine="difference", reduce="last") == -7.0
    assert value(name=pair, combine="ratio", reduce="first") == pytest.approx(4 / 3)
    assert value(name=pair, combine="ratio") is None  # one line divides by zero


def test_mini_batches_and_last_steps_choose_lines() -> None:
    assert value(name="a", mini_batches=(1,)) == 5.5
    assert value(name="a", last_steps=1) == 3.0
    assert value(name="rollout/x") == 0.1


def test_a_missing_metric_or_one_that_is_not_finite_has_no_number() -> None:
    assert value(name="c") is None
    assert value(name="none of these") is None


def test_the_error_of_a_share_counts_samples() -> None:
    metric = StudyMetric(file="eval", name="avg_at_k", reduce="first", error="binomial")
    assert measure_error(metric, LINES) == pytest.approx(math.sqrt(0.4 * 0.6 / 1024))
    assert measure_error(metric, LINES) == pytest.approx(0.0153, abs=1e-4)
    assert measure_error(StudyMetric(file="eval", name="avg_at_k"), LINES) is None


def test_lines_of_a_run_that_has_not_begun_are_none(tmp_path: Path) -> None:
    assert read_lines(tmp_path) == {"metrics": [], "eval": []}


# ---- stop rules ------------------------------------------------------------------------------------------------


def stops(of: dict[str, list[dict[str, Any]]], **rule: Any) -> str:
    return stop_reason([STOPS.validate_python(rule)], of)


def test_a_run_stops_if_its_accuracy_has_fallen_below_half() -> None:
    rule = {"kind": "fall", "name": "avg_at_k", "to": 0.5}
    assert stops(LINES, **rule) == "fall: avg_at_k is 0.1 after step 2, below 0.5 of its first value 0.4"
    assert stops({**LINES, "eval": LINES["eval"][:1]}, **rule) == ""
    assert stops(LINES, **{**rule, "to": 0.25}) == ""  # not below it


@pytest.mark.parametrize(
    ("values", "stopped"),
    [
        ([1, 9, 9], True),
        ([9, 9, 1], False),
        ([9, 1, 9], False),
        ([9], False),
        ([1, None, 9], True),
    ],
)
def test_a_run_stops_after_so_many_consecutive_lines_beyond_a_bound(values: list[float | None], stopped: bool) -> None:
    lines = {"metrics": [{"step": n, "mini_batch": 0, "x": v} for n, v in enumerate(values, 1)], "eval": []}
    assert bool(stops(lines, kind="beyond", name="x", above=5, lines=2)) is stopped
    negative = {"metrics": [{**line, "x": line["x"] and -line["x"]} for line in lines["metrics"]], "eval": []}
    assert bool(stops(negative, kind="beyond", name="x", below=-5, lines=2)) is stopped


def test_the_reason_to_stop_has_the_numbers() -> None:
    said = stops(LINES, kind="beyond", name="b", above=11, below=-1, mini_batches=(1,))
    assert said == "beyond: b is 12 in step 2, and above 11 or below -1 in 1 consecutive lines"


# ---- the time left ---------------------------------------------------------------------------------------------


class Config:
    class train:
        steps = 10


def planned(arm: str, seed: int) -> PlannedRun:
    return PlannedRun(0, f"{arm}-{seed}", arm, seed, {}, 1, None, Config)  # type: ignore[arg-type]


def test_the_time_left_follows_from_ended_runs_of_the_same_arm() -> None:
    left = [planned("a", 1), planned("b", 1), planned("c", 0)]
    ended = [RunOutcome(0, "", arm, 0, {}, "done", seconds=seconds) for arm, seconds in (("a", 10.0), ("b", 30.0))]
    assert time_left(left[0], left, ended, 4.0, 3) == 10 + 30 + 20 - 4
    assert time_left(left[0], left, [], 4.0, 2) == 3 * 20 - 4
    assert time_left(left[0], left, [], 4.0, 0) is None
