"""Edges of stability: where they are, how well a grid knows them, and what moves them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from study_files import outcomes, says

from megatron_rl.study.outcome import RunOutcome

LRS = (1e-4, 2e-4, 4e-4, 8e-4)
EDGE = {
    "kind": "grid_edge",
    "along": "lr",
    "over": "n",
    "confirms": {"min": -1.3, "max": -0.7},
    "refutes": {"min": -0.3, "max": 0.3},
}


def grid(edges: dict[float, int], seeds: int = 2, **at: str) -> list[RunOutcome]:
    """Runs over LRS for each n; those with an index above the n's edge are stopped."""
    return [
        each
        for n, edge in edges.items()
        for index, lr in enumerate(LRS)
        for each in outcomes("", [1.0] * seeds, status="done" if index <= edge else "stopped", n=n, lr=lr, **at)
    ]


@pytest.mark.parametrize(
    ("edges", "verdict"),
    [
        ({1: 2, 2: 1, 4: 0}, "confirmed"),  # 4e-4, 2e-4, 1e-4: slope -1
        ({1: 1, 2: 1, 4: 1}, "refuted"),
        ({1: 2, 2: 2, 4: 1}, "underpowered"),  # slope -.5, and by the grid's steps anything from -.9 to -.1
        ({1: 3, 2: 2, 4: 1}, "underpowered"),  # the grid ends before n = 1 breaks
        ({1: 2, 2: 1, 4: -1}, "underpowered"),
    ],
)
def test_verdicts_on_a_grid_edge(edges: dict[float, int], verdict: str) -> None:
    judgement = says(grid(edges), **EDGE)
    assert judgement.verdict == verdict
    shown = {-1: "below the grid", 3: "above the grid"}
    expected = {f"{n}": shown.get(edge, LRS[edge]) for n, edge in edges.items()}
    assert judgement.numbers["edges"]["0"] == expected


def test_the_error_of_an_edges_slope_is_not_below_that_of_the_grid() -> None:
    """Seeds agree to the digit, because an edge is one of few values. The simulation draws where stability ends."""
    numbers = says(grid({1: 1, 2: 1, 4: 1}, seeds=3), **EDGE).numbers
    rng = np.random.default_rng(0)
    x = np.log([1, 2, 4])
    slopes = [np.polyfit(x, rng.uniform(np.log(2e-4), np.log(4e-4), 3), 1)[0] for _ in range(4000)]
    assert numbers["slope"] == pytest.approx(0, abs=1e-12)
    assert numbers["standard_error"] == pytest.approx(np.std(slopes), rel=0.05)


def test_an_edge_is_that_of_all_runs_at_its_value() -> None:
    """A third factor has three values. One unstable run makes its learning rate unstable, and a step is a step."""
    threes = [run for k in range(3) for run in grid({1: 2, 2: 1}, k=str(k))]
    assert says(threes, **EDGE).numbers["edges"]["0"] == {"1": 4e-4, "2": 2e-4}
    worse = grid({1: 0, 2: 1}, k="3")
    for results in (worse + threes, threes + worse):  # whichever comes last
        assert says(results, **EDGE).numbers["edges"]["0"] == {"1": 1e-4, "2": 2e-4}
    shift = {"kind": "edge_shift", "along": "lr", "factor": "r", "value": "a", "against": "b", "confirms": {"min": 2}}
    moved = [run for k in range(3) for run in [*grid({4: 2}, r="a", k=str(k)), *grid({4: 1}, r="b", k=str(k))]]
    assert says(moved, **shift).numbers["by_seed"] == {"0": 1.0, "1": 1.0}


def test_a_run_that_was_left_out_leaves_its_edge_unknown() -> None:
    """A seed whose edge is not known has no number, and is one of the seeds all the same."""
    results = [
        dataclasses.replace(each, status="left out") if each.at == {"n": 1, "lr": 8e-4} else each
        for each in grid({1: 2, 2: 1, 4: 0})
    ]
    judgement = says(results, **EDGE)
    assert judgement.verdict == "underpowered"
    assert judgement.numbers["edges"]["0"]["1"] == "not known"
    shift = {"kind": "edge_shift", "along": "lr", "factor": "r", "value": "a", "against": "b", "confirms": {"min": 1}}
    runs = grid({4: 2}, seeds=3, r="a") + grid({4: 1}, seeds=3, r="b")
    assert says(runs, **shift).verdict == "confirmed"
    runs[2] = dataclasses.replace(runs[2], status="left out")
    assert says(runs, **shift).numbers["by_seed"] == {"0": 1.0, "1": 1.0, "2": None}
    assert says(runs, **shift).verdict == "underpowered"


def test_a_stable_run_above_an_unstable_one_does_not_move_the_edge() -> None:
    results = [each for each in grid({1: 3, 2: 2}) if each.at != {"n": 1, "lr": 2e-4}]
    results += outcomes("", [1.0, 1.0], status="stopped", n=1, lr=2e-4)
    assert says(results, **EDGE).numbers["edges"]["0"] == {"1": 1e-4, "2": 4e-4}


def test_an_edge_that_moves_by_a_grid_step_is_counted_by_seed() -> None:
    rule = {
        "kind": "edge_shift",
        "along": "lr",
        "factor": "replay",
        "value": "r2",
        "against": "none",
        "where": {"n": 4},
        "confirms": {"min": 1},
        "refutes": {"max": 0},
        "seeds": 2,
    }
    moved = grid({4: 2}, replay="r2") + grid({4: 1}, replay="none")
    assert says(moved, **rule).verdict == "confirmed"
    assert says(moved, **rule).numbers["by_seed"] == {"0": 1.0, "1": 1.0}
    assert says(grid({4: 1}, replay="r2") + grid({4: 1}, replay="none"), **rule).verdict == "refuted"
    assert says(grid({4: 3}, replay="r2") + grid({4: 1}, replay="none"), **rule).verdict == "confirmed"
    assert says(grid({4: 3}, replay="r2") + grid({4: 3}, replay="none"), **rule).verdict == "underpowered"
    # Below the grid in both arms: the shift can be anything. Below it in one: at most so much.
    assert says(grid({4: -1}, replay="r2") + grid({4: -1}, replay="none"), **rule).verdict == "underpowered"
    assert says(grid({4: -1}, replay="r2") + grid({4: 1}, replay="none"), **rule).verdict == "refuted"
    assert says(grid({4: 1}, replay="r2") + grid({4: -1}, replay="none"), **rule).verdict == "confirmed"
    exact = {**rule, "confirms": {"min": 1, "max": 2}, "refutes": {"min": 3}}
    assert says(grid({4: 3}, replay="r2") + grid({4: 1}, replay="none"), **exact).verdict == "underpowered"
    fewer = [run for run in grid({4: 2}, replay="r2") if run.at["lr"] != LRS[0]]
    assert says(fewer + grid({4: 1}, replay="none"), **rule).verdict == "underpowered"
