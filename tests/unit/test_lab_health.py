"""The verdict on a run, from made-up histories: healthy ones, collapsed ones, and ones with a first sign."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.health import AFTER_STEP, RULES, Severity, Sign, judge

CHANGE = "routing/expert_change/old_policy/live"
HEALTHY: dict[str, Any] = {
    "rollout/accuracy": 0.4,
    "rollout/prompts": 32,
    "rollout/truncated": 0.02,
    "rollout/group/dead": 0.2,
    "rollout/lost_verdicts": 0,
    "entropy/mean": 1.0,
    "kl/old_policy/k3": 0.002,
    "kl/rollout_old/k3": 0.001,
    "rho/beyond_2": 1e-4,
    "clip/low/any/token": 0.3,
    "clip/high/any/token": 0.3,
    "skipped": 0.0,
    "grad_norm": 0.5,
    f"{CHANGE}/mean": 0.01,
    f"{CHANGE}/layer_02": 0.03,
    f"{CHANGE}/layer_11": 0.01,
}


def history(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """One step of one mini-batch for each dict, which changes HEALTHY."""
    return [{"step": step, "mini_batch": 0, **HEALTHY, **more} for step, more in enumerate(changes, start=1)]


def accuracies(*values: float, prompts: int = 32) -> list[dict[str, Any]]:
    return history(*({"rollout/accuracy": value, "rollout/prompts": prompts} for value in values))


def test_a_healthy_history_is_healthy() -> None:
    health = judge(history({}, {}, {}, {}))
    assert (health.severity, health.fired, health.first, health.decisive) == (Severity.HEALTHY, [], None, None)
    assert [rule.name for rule in health.unjudged] == ["held-out accuracy halved"]


def test_every_rule_names_a_declared_metric_and_says_why() -> None:
    for rule in RULES:
        assert rule.reason
        assert rule.source
        files = ("metrics.jsonl", "eval.jsonl")
        assert not rule.needs or any(DECLARATION.find(file, rule.needs) for file in files), rule.name


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((0.40, 0.42, 0.02, 0.01), 3),  # in one step
        ((0.37, 0.35, 0.30, 0.20, 0.10, 0.09), 5),  # in several
        ((0.4, 0.4, 0.02), 3),  # a stop rule ended the run at once
        ((0.1, 0.3, 0.6, 0.7, 0.2, 0.2), 5),  # half of the best, not of the start
    ],
)
def test_an_accuracy_below_half_of_the_best_is_a_collapse(values: tuple[float, ...], step: int) -> None:
    health = judge(accuracies(*values))
    assert health.severity is Severity.COLLAPSED
    assert health.decisive is not None
    rule, sign = health.decisive
    assert (rule.name, sign.step, sign.layer) == ("accuracy halved", step, None)


@pytest.mark.parametrize(
    ("values", "prompts"),
    [
        ((0.4, 0.4, 0.4, 0.02, 0.4, 0.4), 32),  # one step, and back
        ((0.4, 0.25, 0.25, 0.25), 32),  # not half
        ((0.05, 0.05, 0.02, 0.02), 32),  # within two standard errors, 0.077
        ((0.4, 0.45, 0.6, 0.7), 32),
        ((0.0, 0.0, 0.0), 32),
        ((0.4,), 32),
    ],
)
def test_noise_and_learning_are_no_collapse(values: tuple[float, ...], prompts: int) -> None:
    assert judge(accuracies(*values, prompts=prompts)).severity is Severity.HEALTHY


def test_more_prompts_make_a_small_fall_significant() -> None:
    assert judge(accuracies(0.05, 0.05, 0.02, 0.02, prompts=1000)).severity is Severity.COLLAPSED


def test_a_held_out_accuracy_below_half_is_a_collapse_after_its_step() -> None:
    evaluations = [{"step": step, "avg_at_k": value, "prompts": 64} for step, value in ((0, 0.4), (10, 0.5), (20, 0.1))]
    health = judge(history({}, {}), evaluations)
    assert health.severity is Severity.COLLAPSED
    assert health.decisive is not None
    assert health.decisive[1].step == 20
    assert health.decisive[1].mini_batch == AFTER_STEP


@pytest.mark.parametrize(
    ("rule", "change", "layer"),
    [
        ("experts change", {f"{CHANGE}/mean": 0.05, f"{CHANGE}/layer_11": 0.2}, 11),
        ("experts change", {f"{CHANGE}/mean": 0.05, f"{CHANGE}/layer_11": None}, 2),
        ("updates drift", {"kl/old_policy/k3": 0.06}, None),
        ("engines disagree", {"kl/rollout_old/k3": 0.02}, None),
        ("heavy tail of rho", {"rho/beyond_2": 0.002}, None),
        ("almost all tokens beyond the clip", {"clip/low/any/token": 0.5, "clip/high/any/token": 0.45}, None),
        ("entropy collapse", {"entropy/mean": 0.09}, None),
        ("responses cut", {"rollout/truncated": 0.6}, None),
        ("groups dead", {"rollout/group/dead": 0.95}, None),
        ("not finite", {"loss": None}, None),
        ("not finite", {"rho/not_finite": 3}, None),
        ("outside its healthy range", {"rollout/lost_verdicts": 2}, None),
        ("outside its healthy range", {"skipped": 1.0}, None),
    ],
)
def test_a_metric_beyond_its_bound_is_a_warning(rule: str, change: dict[str, Any], layer: int | None) -> None:
    health = judge(history({}, {}, change, {}, change))
    assert health.severity is Severity.WARNING
    fired = {each.name: (sign.step, sign.layer, count) for each, sign, count in health.fired}
    expected = {rule: (3, layer, 2)}
    if change.get(f"{CHANGE}/layer_11", 0) is None:
        expected["not finite"] = (3, None, 2)
    assert fired == expected


def test_values_at_their_bounds_are_healthy() -> None:
    at = {"kl/old_policy/k3": 0.05, "rho/beyond_2": 1e-3, "entropy/mean": 0.1, f"{CHANGE}/mean": 0.04}
    assert judge(history({}, at)).severity is Severity.HEALTHY


def test_three_skipped_optimizer_steps_in_a_row_are_a_collapse() -> None:
    skipped: dict[str, Any] = {"skipped": 1.0, "grad_norm": None}
    two = judge(history({}, skipped, skipped, {}, skipped, skipped))
    assert two.severity is Severity.WARNING
    three = judge(history({}, skipped, skipped, skipped))
    assert three.severity is Severity.COLLAPSED
    assert three.decisive is not None
    assert (three.decisive[0].name, three.decisive[1].step) == ("optimizer stuck", 2)


def test_the_first_sign_comes_before_the_collapse_that_decides() -> None:
    lines = accuracies(0.4, 0.4, 0.4, 0.05, 0.03)
    lines[1] |= {f"{CHANGE}/mean": 0.13, f"{CHANGE}/layer_02": 0.3}
    health = judge(lines)
    assert health.severity is Severity.COLLAPSED
    assert health.first is not None
    assert health.decisive is not None
    assert (health.first[0].name, health.first[1].step, health.first[1].layer) == ("experts change", 2, 2)
    assert health.decisive[1].step == 4
    assert health.lead == 2  # the optimizer steps of steps 2 and 3


def test_a_warning_leads_by_the_optimizer_steps_up_to_the_collapse() -> None:
    """With four mini-batches a step; the accuracy is of the first one's line."""
    steps = accuracies(0.4, 0.4, 0.05, 0.03)
    lines = [{**line, "mini_batch": index} for line in steps for index in range(4)]
    for line in lines:
        if line["mini_batch"]:
            del line["rollout/accuracy"]
    assert judge(lines).lead is None  # no warning
    lines[5]["kl/old_policy/k3"] = 1.0
    assert judge(lines).lead == 3
    lines[5]["kl/old_policy/k3"], lines[8]["kl/old_policy/k3"] = 0.0, 1.0
    assert judge(lines).lead is None  # at the collapse, not before it
    assert judge(lines[:8]).lead is None  # no collapse


def test_mini_batches_of_a_step_are_in_order() -> None:
    lines = [{"step": 1, "mini_batch": 0, "kl/old_policy/k3": 0.0}, {"step": 1, "mini_batch": 1, "rho/beyond_2": 0.5}]
    lines.append({"step": 1, "mini_batch": 2, "kl/old_policy/k3": 0.5})
    assert [(sign.step, sign.mini_batch) for _, sign, _ in judge(lines).fired] == [(1, 1), (1, 2)]


def test_a_run_without_a_rules_metrics_is_not_judged_by_it() -> None:
    health = judge([{"step": 1, "mini_batch": 0, "nll/mean": 2.0}, {"step": 2, "mini_batch": 0, "nll/mean": 1.0}])
    assert health.severity is Severity.HEALTHY
    assert {rule.name for rule in health.unjudged} == {rule.name for rule in RULES if rule.needs}


def test_no_lines_are_judged_without_an_error() -> None:
    assert judge([]).severity is Severity.HEALTHY


def test_signs_say_what_was_found() -> None:
    (fired,) = judge(history({}, {"kl/old_policy/k3": 0.123456})).fired
    assert fired[1] == Sign(2, 0, "kl/old_policy/k3 0.123", None)
