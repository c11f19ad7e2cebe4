"""Figures of ratios, contrasts of experts and the named cause, against formulas written in another way."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.counterfactual.attribution_lines import (
    GATES,
    PRECISION,
    ROUTING,
    Findings,
    Gap,
    LayerShare,
    Substitution,
    attribution_lines,
    cause,
)
from megatron_rl.counterfactual.contrasts import ExpertContrast, expert_contrasts
from megatron_rl.counterfactual.ratio_figures import ess, explained, kl_k3, ratio_figures, trimmed_variance

LOGS = st.floats(-3, 3)


@given(st.lists(st.lists(st.tuples(LOGS, LOGS, LOGS), min_size=1, max_size=9), min_size=1, max_size=9))
def test_ratio_figures_are_those_of_the_ratios_themselves(responses: list[list[tuple[float, float, float]]]) -> None:
    new, old, mu = (np.array([row[k] for each in responses for row in each]) for k in range(3))
    found = ratio_figures(new, old, mu, [len(each) for each in responses])
    r, rho = np.exp(new - old), np.exp(old - mu)
    assert found["kl/old_policy/k3"] == pytest.approx(np.mean(r - 1 - np.log(r)), abs=1e-9)
    assert found["kl/rollout_old/k3"] == pytest.approx(np.mean(rho - 1 - np.log(rho)), abs=1e-9)
    assert found["ratio/ess"] == pytest.approx(r.sum() ** 2 / (r**2).sum() / len(r))
    assert found["omega/ess"] == pytest.approx((r * rho).sum() ** 2 / ((r * rho) ** 2).sum() / len(r))
    assert found["rho/beyond_2"] == np.mean([max(x, 1 / x) > 2 for x in rho])
    s = [math.prod(math.exp(a - b) for a, b, _ in each) ** (1 / len(each)) for each in responses]
    assert found["abs_log_s/mean"] == pytest.approx(np.mean(np.abs(np.log(s))), abs=1e-9)
    assert found["log_r/p50"] == sorted(new - old)[math.ceil(len(r) / 2) - 1]
    assert found["abs_logprob_gap/max"] == np.abs(old - mu).max()


def test_the_trimmed_variance_leaves_out_one_percent_at_each_end() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    wild = values.copy()
    wild[np.argsort(values)[:10]] -= 1e6
    wild[np.argsort(values)[-10:]] += 1e6
    assert trimmed_variance(wild) == trimmed_variance(values) == pytest.approx(np.var(np.sort(values)[10:990]))
    assert trimmed_variance(values[:99]) == pytest.approx(np.var(values[:99]))  # fewer than a hundred: none


def test_figures_of_extreme_ratios_stay_finite_if_they_can() -> None:
    assert ess(np.array([2000.0, 2000.0])) == 1.0
    assert ess(np.array([2000.0, -2000.0])) == 0.5
    assert kl_k3(np.zeros(3)) == 0.0
    assert explained(0.0, 0.0) is None
    assert explained(4.0, 1.0) == 0.75


def test_expert_contrasts_are_welchs_t() -> None:
    rng = np.random.default_rng(1)
    values, experts = rng.exponential(size=200), rng.integers(0, 5, (200, 2))
    values[experts[:, 1] == 3] += 1.0
    sums = torch.zeros(3, 2, 6, dtype=torch.float64)  # nobody visits expert 5
    for layer in range(2):
        for value, expert in zip(values, experts[:, layer], strict=True):
            sums[:, layer, expert] += torch.tensor([1.0, value, value**2], dtype=torch.float64)
    found = expert_contrasts(sums, values, [4, 7])
    assert len(found) == 10
    assert (found[0].layer, found[0].expert) == (7, 3)
    assert [each.t for each in found] == sorted((each.t for each in found), reverse=True)
    for each in found:
        inside = experts[:, [4, 7].index(each.layer)] == each.expert
        samples = [values[inside].tolist(), values[~inside].tolist()]
        error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in samples))
        assert each.t == pytest.approx((statistics.fmean(samples[0]) - statistics.fmean(samples[1])) / error)
        assert (each.tokens, each.mean) == (inside.sum(), pytest.approx(values[inside].mean()))
        assert each.others == pytest.approx(values[~inside].mean())


def gap(mean: float) -> Gap:
    return Gap(mean, 2 * mean, 3 * mean)


def findings(
    left: dict[str, float],
    layers: dict[int, float] | None = None,
    t: tuple[float, ...] = (),
    joint: float | None = None,
) -> Findings:
    """Findings with a gap of 1 before, and what is left of it after each substitution."""
    parts = [Substitution(name, "", gap(mean)) for name, mean in left.items()]
    explaining = tuple(name for name, mean in left.items() if mean < 0.98 and name != PRECISION)
    return Findings(
        before=gap(1.0),
        substitutions=(*parts, Substitution("expert order", "", None, "why")),
        joint_parts=explaining,
        joint=None if joint is None else gap(joint),
        layers=tuple(LayerShare(layer, 0.1, gap(mean)) for layer, mean in (layers or {}).items()),
        experts=tuple(ExpertContrast(2, number, 9, 1.0, 0.5, value) for number, value in enumerate(t)),
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (findings({ROUTING: 0.1, "head": 0.4, PRECISION: 0.0}), ROUTING),
        (findings({ROUTING: 0.1, PRECISION: 0.0}, {0: 0.9, 2: 0.2}), "routing of layer 2"),
        (findings({ROUTING: 0.1, PRECISION: 0.0}, {0: 0.6, 2: 0.6}), ROUTING),
        (findings({"head": 0.1, GATES: 0.3, PRECISION: 0.0}, {2: 0.2}), "head"),
        (findings({"head": 0.6, PRECISION: 0.0}, t=(9.0, 5.0)), "expert 0 of layer 2"),
        (findings({"head": 0.6, PRECISION: 0.0}, t=(9.0, 7.0)), "not attributed"),
        (findings({"head": 0.6, PRECISION: 0.0}, t=(4.0, 1.0)), "not attributed"),
        (findings({"head": 1.6, PRECISION: 0.0}, t=(9.0,)), "expert 0 of layer 2"),
    ],
)
def test_the_cause_is_the_part_that_explains_most_or_the_expert_that_stands_out(found: Findings, expected: str) -> None:
    assert cause(found) == expected


def test_a_gap_of_rounding_has_no_cause() -> None:
    found = dataclasses.replace(findings({ROUTING: 0.0, PRECISION: 0.0}), before=gap(9e-6))
    assert cause(found) == "none"


def test_shares_interaction_and_what_is_left_add_up() -> None:
    lines = attribution_lines(
        findings({ROUTING: 0.5, "head": 0.7, "norms": 1.2, PRECISION: 0.0}, joint=0.1), "run", 3, 77
    )
    assert lines[0] | {"tokens": 77, "step": 3, "before/p99": 2.0} == lines[0]
    shares = {line["part"]: line.get("share") for line in lines if line["kind"] == "substitution"}
    assert shares == pytest.approx({ROUTING: 0.5, "head": 0.3, "norms": -0.2, PRECISION: 1.0, "expert order": None})
    (joint,) = (line for line in lines if line["kind"] == "joint")
    assert joint["parts"] == [ROUTING, "head"]
    assert (joint["share"], joint["interaction"], joint["unattributed"]) == pytest.approx((0.9, 0.1, 0.1))
