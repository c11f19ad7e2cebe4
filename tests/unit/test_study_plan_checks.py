"""Rules that could never decide are refused before a study runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_files import write_study

from megatron_rl.study.arms import ArmPoint
from megatron_rl.study.plan_checks import names_that_rules_miss
from megatron_rl.study.study_file import load_study

STOP = {"kind": "fall", "name": "avg_at_k", "to": 0.5}
SLOPE = {"kind": "slope", "metric": "m", "x_factor": "n", "confirms": {"min": 1}}
EDGE = {"kind": "grid_edge", "along": "lr", "over": "n", "confirms": {"min": 1}}
SHIFT = {"kind": "edge_shift", "along": "lr", "factor": "n", "value": 1, "against": 2, "confirms": {"min": 1}}
GRID = [{"lr": lr, "n": n} for lr in (1e-4, 1e-3) for n in (1, 2)]


def problems(tmp_path: Path, rule: dict[str, Any], points: list[dict[str, Any]], **keys: Any) -> list[str]:
    metrics = {"m": {"name": "loss"}}
    study = load_study(
        write_study(tmp_path / "study.yaml", tmp_path / "base.yaml", {"a": {}}, rule=rule, metrics=metrics, **keys)
    )
    arms = {
        f"arm{number}": ArmPoint(f"arm{number}", {}, {}, tmp_path, (0,), 1, None, None, at)
        for number, at in enumerate(points)
    }
    return list(names_that_rules_miss(study, arms))


@pytest.mark.parametrize("rule", [SLOPE, {**SLOPE, "where": {"lr": 1e-4}}, EDGE, SHIFT])
def test_a_rule_with_all_that_it_needs_is_accepted(tmp_path: Path, rule: dict[str, Any]) -> None:
    assert problems(tmp_path, rule, GRID, stops=[STOP]) == []


@pytest.mark.parametrize(
    ("rule", "points", "problem"),
    [
        (SLOPE, GRID[::2], "rule: all its arms have 1 in 'n'; it needs two values at least"),
        ({**SLOPE, "where": {"lr": 5}}, GRID, "rule.where: no arm has {'lr': 5}"),
        ({**SLOPE, "where": {"n": 1}}, GRID, "rule: all its arms have 1 in 'n'; it needs two values at least"),
        ({**SLOPE, "x_factor": None, "x_metric": "m"}, GRID[:1], "rule: a slope needs two arms at least"),
        (EDGE, GRID[:2], "rule: all its arms have 0.0001 in 'lr'; it needs two values at least"),
        (SHIFT, GRID[:2], "rule: all its arms have 0.0001 in 'lr'; it needs two values at least"),
        ({**SHIFT, "against": 3}, GRID, "rule.against: found 3; the arms have 1, 2 in 'n'"),
    ],
)
def test_a_rule_without_the_arms_that_it_needs_is_refused(
    tmp_path: Path, rule: dict[str, Any], points: list[dict[str, Any]], problem: str
) -> None:
    assert problems(tmp_path, rule, points, stops=[STOP]) == [problem]


@pytest.mark.parametrize("rule", [EDGE, SHIFT])
def test_an_edge_needs_a_stop_rule(tmp_path: Path, rule: dict[str, Any]) -> None:
    assert problems(tmp_path, rule, GRID) == [
        "rule: without `stops` only a run that fails could be beyond an edge; add a stop rule"
    ]
