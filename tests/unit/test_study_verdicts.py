"""What decision rules make of results: worked examples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_files import outcomes, says

from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.power_law import fit

# ---- a difference of two arms ----------------------------------------------------------------------------------

DIFFERENCE = {
    "kind": "difference",
    "metric": "m",
    "arm": "new",
    "against": "old",
    "confirms": {"min": 2},
    "refutes": {"max": 0},
}


def test_a_difference_is_measured_in_its_standard_errors() -> None:
    """Means .6 and .4; standard deviations .02 and .1 of 3 and 4 seeds: an error of sqrt(.0004/3 + .01/4) = .0513."""
    new, old = outcomes("new", [0.58, 0.60, 0.62]), outcomes("old", [0.27, 0.40, 0.43, 0.50])
    variance = np.var([0.27, 0.40, 0.43, 0.50], ddof=1)
    judgement = says(new + old, **DIFFERENCE)
    assert judgement.verdict == "confirmed"
    assert judgement.numbers["difference"] == pytest.approx(0.2)
    assert judgement.numbers["standard_error"] == pytest.approx(math.sqrt(0.0004 / 3 + variance / 4))
    assert judgement.numbers["in_standard_errors"] == pytest.approx(0.2 / math.sqrt(0.0004 / 3 + variance / 4))
    assert says(old, **{**DIFFERENCE, "arm": "old", "against": "old"}).verdict == "refuted"


def with_error(results: list[RunOutcome], error: float) -> list[RunOutcome]:
    return [dataclasses.replace(each, errors={"m": error}) for each in results]


def test_seeds_that_tie_do_not_hide_the_error_of_their_evaluations() -> None:
    """Accuracies take few values, so the differences of two pairs may be equal by chance."""
    tied = with_error(outcomes("new", [0.5, 0.6]) + outcomes("old", [0.49, 0.59]), 0.05)
    for paired in (False, True):
        judgement = says(tied, **DIFFERENCE, paired=paired)
        assert judgement.numbers["standard_error"] >= 0.05 * (1 - 1e-12)  # sqrt(2 * 0.05^2 / 2)
        assert judgement.verdict != "confirmed"
        assert says(tied, **DIFFERENCE, paired=paired, max_error=0.03).verdict == "underpowered"
    assert says(tied, **DIFFERENCE, paired=True).numbers["standard_error"] == pytest.approx(0.05)


@pytest.mark.parametrize("paired", [False, True])
def test_a_mean_of_the_seeds_that_are_left_confirms_nothing(paired: bool) -> None:
    new, old = outcomes("new", [1, 1.01, None]), outcomes("old", [0, 0.01, 0.02])
    assert says(new + old, **DIFFERENCE, paired=paired).verdict == "underpowered"
    assert says(new + old, **DIFFERENCE, paired=paired, min_seeds=2).verdict == "confirmed"
    gone = [dataclasses.replace(each, status="left out") if each.metrics["m"] is None else each for each in new]
    assert says(gone + old, **DIFFERENCE, paired=paired).verdict == "underpowered"


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        ([0.6, 0.62], [0.4, 0.42], "confirmed"),
        ([0.4, 0.42], [0.6, 0.62], "refuted"),
        ([0.6, 0.6], [0.4, 0.4], "confirmed"),  # without any spread
        ([0.50, 0.56], [0.48, 0.52], "undecided"),
        ([0.6, None], [0.4, 0.42], "underpowered"),
    ],
)
def test_verdicts_on_a_difference(new: list[float | None], old: list[float | None], verdict: str) -> None:
    assert says(outcomes("new", new) + outcomes("old", old), **DIFFERENCE).verdict == verdict


def test_a_paired_difference_ignores_what_seeds_have_in_common() -> None:
    new, old = outcomes("new", [0.15, 0.55, 0.96]), outcomes("old", [0.10, 0.50, 0.90])
    assert says(new + old, **DIFFERENCE).verdict == "undecided"
    paired = says(new + old, **DIFFERENCE, paired=True)
    assert paired.verdict == "confirmed"
    differences = [0.05, 0.05, 0.06]
    assert paired.numbers["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))


def test_equality_confirms_only_with_a_small_standard_error() -> None:
    same: dict[str, Any] = {**DIFFERENCE, "confirms": {"min": -2, "max": 2}, "refutes": None, "max_error": 0.02}
    noisy = outcomes("new", [0.3, 0.5]) + outcomes("old", [0.35, 0.55])
    assert says(noisy, **{**same, "max_error": None}).verdict == "confirmed"
    assert says(noisy, **same).verdict == "underpowered"
    exact = outcomes("new", [0.40, 0.41]) + outcomes("old", [0.40, 0.42])
    assert says(exact, **same).verdict == "confirmed"


def test_an_arms_error_is_at_least_the_error_of_its_evaluations() -> None:
    """Two seeds that agree by chance to .0001 do not make two evaluations with an error of .015 exact."""
    results = [
        RunOutcome(0, "", arm, seed, {}, "done", metrics={"m": value}, errors={"m": 0.015})
        for arm, values in (("new", (0.42, 0.4201)), ("old", (0.40, 0.4001)))
        for seed, value in enumerate(values)
    ]
    judgement = says(results, **DIFFERENCE)
    assert judgement.numbers["standard_error"] == pytest.approx(0.015)  # sqrt(.015^2 / 2 + .015^2 / 2)
    assert judgement.verdict == "undecided"


def test_an_absolute_difference_must_keep_its_interval_out_of_the_other_band() -> None:
    rule = {**DIFFERENCE, "unit": "absolute", "confirms": {"min": 0.1}, "refutes": {"max": 0.0}}
    clear = outcomes("new", [0.55, 0.56]) + outcomes("old", [0.40, 0.41])
    assert says(clear, **rule).verdict == "confirmed"
    noisy = outcomes("new", [0.4, 0.7]) + outcomes("old", [0.40, 0.41])
    assert says(noisy, **rule).verdict == "underpowered"


# ---- slopes ----------------------------------------------------------------------------------------------------

SLOPE = {
    "kind": "slope",
    "metric": "m",
    "x_factor": "length",
    "confirms": {"min": -0.6, "max": -0.4},
    "refutes": {"min": -0.3},
}


def powers(exponent: float, noise: tuple[float, ...] = (0.99, 1.0, 1.01)) -> list[RunOutcome]:
    """Three arms with m = length ^ (exponent * noise), one seed for each noise."""
    return [
        each
        for length in (20, 60, 180)
        for each in outcomes(f"l{length}", [length ** (exponent * n) for n in noise], length=length)
    ]


@pytest.mark.parametrize(("exponent", "verdict"), [(-0.5, "confirmed"), (-0.1, "refuted"), (-0.35, "undecided")])
def test_verdicts_on_a_slope(exponent: float, verdict: str) -> None:
    judgement = says(powers(exponent), **SLOPE)
    assert judgement.verdict == verdict
    assert judgement.numbers["slope"] == pytest.approx(exponent)
    assert judgement.numbers["by_seed"]["0"] == pytest.approx(0.99 * exponent)


def test_a_slope_that_the_seeds_do_not_agree_on_is_underpowered() -> None:
    """Slopes -.25, -.5, -.75: the mean is in the band, but twice its error of .144 reaches above -.3."""
    assert says(powers(-0.5, (0.5, 1.0, 1.5)), **SLOPE).verdict == "underpowered"
    assert says(powers(-0.5, (1.0,)), **SLOPE).verdict == "underpowered"
    assert says(powers(-0.5, (1.0,)), **SLOPE, min_seeds=1).verdict == "confirmed"


def test_a_slope_through_points_on_no_line_is_underpowered() -> None:
    """Three seeds agree that m falls from 20 to 60 and rises again to 180: the slope is -.5, and says nothing."""
    shape = {20: 1.0, 60: 0.1, 180: 1 / 3}
    results = [each for length, m in shape.items() for each in outcomes(f"l{length}", [m] * 3, length=length)]
    judgement = says(results, **SLOPE)
    assert judgement.verdict == "underpowered"
    _, covariance = np.polyfit(np.log(list(shape)), np.log(list(shape.values())), 1, cov=True)
    errors = [judgement.numbers[key] for key in ("error_of_the_fit", "standard_error")]
    assert errors == pytest.approx([covariance[0, 0] ** 0.5] * 2)


def test_x_may_be_a_metric_and_arms_may_be_chosen() -> None:
    results = [
        RunOutcome(0, "", f"{n}-{x}", seed, {"n": n}, "done", metrics={"m": x ** (-0.5 * (n == 4)), "x": float(x)})
        for n in (1, 4)
        for x in (10, 100)
        for seed in (0, 1)
    ]
    rule: dict[str, Any] = {**SLOPE, "x_factor": None, "x_metric": "x"}
    assert says(results, **rule, where={"n": 4}).verdict == "confirmed"
    assert says(results, **rule, where={"n": 1}).verdict == "refuted"


def test_a_seed_with_a_failed_run_has_no_slope() -> None:
    results = [*powers(-0.5), *outcomes("failed", [None], length=540)]
    assert says(results, **SLOPE).numbers["by_seed"]["0"] is None


@given(
    st.floats(-3, 3),
    st.floats(0.01, 100),
    st.lists(st.floats(0.1, 1000), min_size=2, max_size=6, unique_by=lambda x: round(math.log(x), 1)),
)
def test_the_slope_of_a_power_is_its_exponent(exponent: float, factor: float, x: list[float]) -> None:
    found = fit(x, [factor * each**exponent for each in x])
    assert found is not None
    assert found.slope == pytest.approx(exponent, abs=1e-6)
    assert found.error is None if len(x) == 2 else found.error == pytest.approx(0.0, abs=1e-6)


# ---- shares and thresholds by seed -----------------------------------------------------------------------------

SHARE = {
    "kind": "share",
    "metric": "m",
    "of": "none",
    "without": "r2",
    "confirms": {"min": 0.5},
    "refutes": {"max": 0.1},
}


@pytest.mark.parametrize(
    ("r2", "verdict"),
    [
        ([0.4, 0.8, 0.2], "confirmed"),  # shares .6, .6, .8 of 1, 2, 1
        ([0.95, 1.9, 0.98], "refuted"),
        ([0.4, 0.8, 0.8], "undecided"),
        ([0.4, 0.8, None], "underpowered"),
    ],
)
def test_verdicts_on_a_share(r2: list[float | None], verdict: str) -> None:
    judgement = says(outcomes("none", [1.0, 2.0, 1.0]) + outcomes("r2", r2), **SHARE)
    assert judgement.verdict == verdict
    assert judgement.numbers["by_seed"]["1"] == pytest.approx(1 - (r2[1] or 0) / 2)


def test_one_seed_decides_nothing_unless_the_rule_says_so() -> None:
    results = outcomes("none", [1.0]) + outcomes("r2", [0.4])
    assert says(results, **SHARE).verdict == "underpowered"
    assert says(results, **SHARE, min_seeds=1).verdict == "confirmed"


def test_so_many_seeds_may_be_enough() -> None:
    results = outcomes("none", [1.0] * 5) + outcomes("r2", [0.4, 0.4, 0.4, 0.4, 0.9])
    assert says(results, **SHARE).verdict == "undecided"
    assert says(results, **SHARE, seeds=4).verdict == "confirmed"


def test_a_threshold_is_for_one_arm() -> None:
    rule = {"kind": "threshold", "metric": "m", "arm": "train", "confirms": {"min": 1.5}}
    assert says(outcomes("train", [1.5, 2, 3]), **rule).verdict == "confirmed"
    assert says(outcomes("train", [1.4, 2, 3]), **rule).verdict == "undecided"


# ---- several rules ---------------------------------------------------------------------------------------------

YES, NO, NOTHING, WEAK = [1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [None, None]


@pytest.mark.parametrize(
    ("kind", "a", "b", "verdict"),
    [
        ("all", YES, YES, "confirmed"),
        ("all", YES, NO, "refuted"),
        ("all", NO, WEAK, "refuted"),
        ("all", YES, WEAK, "underpowered"),
        ("all", YES, NOTHING, "undecided"),
        ("any", YES, NO, "confirmed"),
        ("any", WEAK, YES, "confirmed"),
        ("any", NO, NO, "refuted"),
        ("any", NO, WEAK, "underpowered"),
        ("any", NO, NOTHING, "undecided"),
    ],
)
def test_rules_together(kind: str, a: list[float | None], b: list[float | None], verdict: str) -> None:
    inner = [
        {"kind": "threshold", "metric": "m", "arm": arm, "confirms": {"min": 0.9}, "refutes": {"max": 0.1}}
        for arm in ("a", "b")
    ]
    judgement = says(outcomes("a", a) + outcomes("b", b), kind=kind, of=inner)
    assert judgement.verdict == verdict
    assert len(judgement.numbers["of"]) == 2


def test_a_drift_is_cosmetic_if_the_old_router_does_as_well_and_the_load_has_grown() -> None:
    """|acc(graft) - acc(train)| <= 2 standard errors, which must be below .02, and CV(end) / CV(0) >= 1.5 in 3 of 3."""
    equal = {
        "kind": "difference",
        "metric": "accuracy",
        "arm": "graft",
        "against": "train",
        "confirms": {"min": -2, "max": 2},
        "max_error": 0.02,
    }
    grown = {"kind": "threshold", "metric": "cv", "arm": "train", "confirms": {"min": 1.5}, "seeds": 3}

    def results(graft: list[float], cv: list[float]) -> list[RunOutcome]:
        train = outcomes("train", [0.40, 0.41, 0.42], metric="accuracy")
        measured = [
            RunOutcome(**{**each.as_json(), "metrics": {**each.metrics, "cv": value}})
            for each, value in zip(train, cv, strict=True)
        ]
        return [*measured, *outcomes("graft", graft, metric="accuracy")]

    def verdict(graft: list[float], cv: list[float]) -> str:
        return says(results(graft, cv), kind="all", of=[equal, grown]).verdict

    assert verdict([0.41, 0.42, 0.41], [1.6, 2.0, 2.6]) == "confirmed"
    assert verdict([0.41, 0.42, 0.41], [1.6, 2.0, 1.1]) == "undecided"
    assert verdict([0.31, 0.32, 0.30], [1.6, 2.0, 2.6]) == "undecided"
    assert verdict([0.30, 0.45, 0.52], [1.6, 2.0, 2.6]) == "underpowered"


def test_a_correction_wins_if_it_does_so_where_the_mismatch_is_large_and_not_where_it_is_small() -> None:
    def compared(mismatch: str, **bands: Any) -> dict[str, Any]:
        arms = {"arm": f"centered-{mismatch}", "against": f"tis-{mismatch}"}
        return {"kind": "difference", "metric": "m", **arms, **bands}

    def verdict(at_int4: list[float]) -> str:
        results = outcomes("centered-int4", at_int4) + outcomes("tis-int4", [0.20, 0.21, 0.22])
        results += outcomes("centered-bf16", [0.40, 0.42, 0.44]) + outcomes("tis-bf16", [0.41, 0.42, 0.43])
        wins = compared("int4", confirms={"min": 2}, refutes={"max": 1})
        same = compared("bf16", confirms={"min": -1, "max": 1})
        return says(results, kind="all", of=[wins, same]).verdict

    assert verdict([0.30, 0.31, 0.33]) == "confirmed"
    assert verdict([0.20, 0.21, 0.22]) == "refuted"


def test_an_exploration_decides_nothing() -> None:
    assert says([], kind="none").verdict == "none"
