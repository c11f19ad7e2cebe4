"""Judges the health of a run from its metrics: healthy, warning or collapsed, with the first sign and its rule.

Pure functions over the lines of metrics.jsonl and eval.jsonl. A metric that a run lacks is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from megatron_rl.lab.declared import TAGS
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.metric_kinds import Kind

Line = Mapping[str, Any]
"""A line of metrics.jsonl or eval.jsonl: tags, and a number or None by metric."""

AFTER_STEP = 1 << 30
"""Mini-batch of a sign in an evaluation, which is made after all mini-batches of its step."""


class Severity(IntEnum):
    HEALTHY = 0
    WARNING = 1
    COLLAPSED = 2


@dataclass(frozen=True, order=True)
class Sign:
    """One firing of a rule."""

    step: int
    mini_batch: int
    found: str
    """The metric with its value, in words."""
    layer: int | None = None
    """Global number of the layer with the largest value; None for a metric that is not by layer."""


@dataclass(frozen=True)
class Rule:
    name: str
    severity: Severity
    condition: str
    """When the rule fires, in words."""
    reason: str
    source: str
    """Where the bound comes from."""
    signs: Callable[[Sequence[Line], Sequence[Line]], Iterator[Sign]]
    """Yields the firings in order, from the lines of metrics.jsonl and eval.jsonl."""
    needs: str
    """The metric without which the rule cannot fire; empty if any metric will do."""


@dataclass(frozen=True)
class Health:
    """The verdict over a run."""

    severity: Severity
    fired: Sequence[tuple[Rule, Sign, int]]
    """Each rule that fired, with its first sign and the number of its signs, in the order of the first signs."""
    unjudged: Sequence[Rule]
    """Rules whose metric the run lacks."""
    lead: int | None = None
    """Optimizer steps from the first warning to the first sign of the collapse; None if the run has not collapsed, or
    if no warning came before."""

    @property
    def first(self) -> tuple[Rule, Sign] | None:
        """The earliest sign of any rule; None in a healthy run."""
        return self.fired[0][:2] if self.fired else None

    @property
    def decisive(self) -> tuple[Rule, Sign] | None:
        """The earliest sign of the severity of the verdict."""
        return next(((rule, sign) for rule, sign, _ in self.fired if rule.severity == self.severity), None)


def judge(lines: Sequence[Line], evaluations: Sequence[Line] = (), rules: Sequence[Rule] | None = None) -> Health:
    """Applies the rules, RULES by default, to a run's lines in the order of the files."""
    fired, unjudged = [], []
    for rule in RULES if rules is None else rules:
        if rule.needs and not any(rule.needs in line for line in (*lines, *evaluations)):
            unjudged.append(rule)
        elif signs := list(rule.signs(lines, evaluations)):
            fired.append((rule, min(signs, key=_place), len(signs)))
    fired.sort(key=lambda each: (*_place(each[1]), -each[0].severity))
    severity = max((rule.severity for rule, _, _ in fired), default=Severity.HEALTHY)
    return Health(Severity(severity), fired, unjudged, _lead(lines, fired))


def _lead(lines: Sequence[Line], fired: Sequence[tuple[Rule, Sign, int]]) -> int | None:
    places = {
        severity: [_place(sign) for rule, sign, _ in fired if rule.severity == severity]
        for severity in (Severity.WARNING, Severity.COLLAPSED)
    }
    if not all(places.values()):
        return None
    warned, collapsed = (min(each) for each in places.values())
    between = [line for line in lines if warned <= _place(_at(line, "")) < collapsed]
    return len(between) or None


def _place(sign: Sign) -> tuple[int, int]:
    return sign.step, sign.mini_batch


def _at(line: Line, found: str, layer: int | None = None) -> Sign:
    return Sign(line["step"], line.get("mini_batch", AFTER_STEP), found, layer)


# ---- accuracy ------------------------------------------------------------------------------------------------------


def halved(lines: Sequence[Line], accuracy: str, prompts: str) -> Iterator[Sign]:
    """Yields a sign for each line whose accuracy is below half of the best before it, and stays there.

    The best is the largest mean of up to three neighbouring lines before. The line after a sign, if there is one, must
    be below that half too. The fall must exceed two standard errors of the best, with prompts as the independent
    units: sqrt(p (1 - p) / prompts), which is the largest that responses of one prompt can have together.
    """
    measured = [line for line in lines if line.get(accuracy) is not None]
    values = [float(line[accuracy]) for line in measured]
    best = 0.0
    for place in range(1, len(values)):
        window = values[max(place - 3, 0) : place]
        best = max(best, sum(window) / len(window))
        count = measured[place].get(prompts) or math.inf
        error = math.sqrt(best * (1 - best) / count)
        low = [value < best / 2 and best - value > 2 * error for value in values[place : place + 2]]
        if all(low):
            yield _at(measured[place], f"{accuracy} {values[place]:.3g}, {best:.3g} at best before")


# ---- bounds --------------------------------------------------------------------------------------------------------


def above(lines: Sequence[Line], metric: str, bound: float) -> Iterator[Sign]:
    """Yields a sign for each line with metric > bound. For `NAME/mean` over layers it names the layer with the most."""
    for line in lines:
        value = line.get(metric)
        if value is not None and value > bound:
            yield _at(line, f"{metric} {value:.3g}", worst_layer(line, metric.removesuffix("/mean")))


def worst_layer(line: Line, name: str) -> int | None:
    """Returns the layer with the largest `NAME/layer_NN`; None if there are none."""
    prefix = f"{name}/layer_"
    layers = {int(k.removeprefix(prefix)): v for k, v in line.items() if k.startswith(prefix) and v is not None}
    return max(layers, key=lambda layer: layers[layer]) if layers else None


def beyond_band(lines: Sequence[Line], bound: float) -> Iterator[Sign]:
    """Yields a sign for each line with more than `bound` of all tokens outside of the clip's band."""
    for line in lines:
        low, high = (line.get(f"clip/{side}/any/token") for side in ("low", "high"))
        if low is not None and high is not None and low + high > bound:
            yield _at(line, f"clip/low/any/token and clip/high/any/token {low + high:.3g} together")


def entropy_gone(lines: Sequence[Line], share: float) -> Iterator[Sign]:
    """Yields a sign for each line whose mean entropy is below a share of the first."""
    values = [(line, line["entropy/mean"]) for line in lines if line.get("entropy/mean") is not None]
    for line, value in values[1:]:
        if value < share * values[0][1]:
            yield _at(line, f"entropy/mean {value:.3g}, {values[0][1]:.3g} at first")


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def not_finite(lines: Sequence[Line], evaluations: Sequence[Line]) -> Iterator[Sign]:
    """Yields a sign for each line with a metric that is null or that counts values that are not finite."""
    for line in (*lines, *evaluations):
        names = [
            name
            for name, value in line.items()
            if name not in TAGS and (value is None or (name.endswith("/not_finite") and value > 0))
        ]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield _at(line, f"{names[0]}{more} not finite")


def stuck(lines: Sequence[Line], in_a_row: int) -> Iterator[Sign]:
    """Yields a sign where so many optimizer steps in a row were skipped, at the first of them."""
    steps = [line for line in lines if line.get("skipped") is not None]
    for end in range(in_a_row, len(steps) + 1):
        if all(line["skipped"] for line in steps[end - in_a_row : end]):
            yield _at(steps[end - in_a_row], f"skipped 1 in {in_a_row} optimizer steps in a row")


def unhealthy(lines: Sequence[Line], evaluations: Sequence[Line]) -> Iterator[Sign]:
    """Yields a sign for each line with a metric outside of the healthy range that its declaration gives."""
    for file, part in (("metrics.jsonl", lines), ("eval.jsonl", evaluations)):
        ranges = _ranges(file, {name for line in part for name in line})
        for line in part:
            for name, (low, high) in ranges.items():
                value = line.get(name)
                if value is not None and not low <= value <= high:
                    yield _at(line, f"{name} {value:.3g}")


def _ranges(file: str, names: set[str]) -> dict[str, tuple[float, float]]:
    """Returns the healthy ranges of those names that have one. A range is of the metric itself, not of its tails."""
    found = {}
    for name in sorted(names):
        written = DECLARATION.find(file, name)
        healthy = written.metric.healthy if written else None
        if healthy is not None and written is not None and written.metric.kind in (Kind.SUM, Kind.MEAN, Kind.VALUE):
            low = -math.inf if healthy.low is None else healthy.low
            found[name] = low, math.inf if healthy.high is None else healthy.high
    return found


# ---- the rules -------------------------------------------------------------------------------------------------------

_CHANGE = "routing/expert_change/old_policy/live/mean"


def _bound(name: str, metric: str, bound: float, reason: str, source: str) -> Rule:
    def signs(lines: Sequence[Line], _: Sequence[Line]) -> Iterator[Sign]:
        return above(lines, metric, bound)

    return Rule(name, Severity.WARNING, f"{metric} > {bound:g}", reason, source, signs, metric)


RULES: tuple[Rule, ...] = (
    Rule(
        "accuracy halved",
        Severity.COLLAPSED,
        "rollout/accuracy below half of the best mean of three steps before it, also in the next step, and by more "
        "than two standard errors",
        "the policy has lost what it could do",
        "definition of a collapse in this project",
        lambda lines, _: halved(lines, "rollout/accuracy", "rollout/prompts"),
        "rollout/accuracy",
    ),
    Rule(
        "held-out accuracy halved",
        Severity.COLLAPSED,
        "avg_at_k of an evaluation below half of the best before it, also in the next evaluation, and by more than two "
        "standard errors",
        "the policy has lost what it could do",
        "definition of a collapse in this project",
        lambda _, evaluations: halved(evaluations, "avg_at_k", "prompts"),
        "avg_at_k",
    ),
    Rule(
        "optimizer stuck",
        Severity.COLLAPSED,
        "skipped = 1 in three optimizer steps in a row",
        "no weight changes any more: no gradient is finite, or an alarm skips every step",
        "definition of skipped; three in a row is our choice",
        lambda lines, _: stuck(lines, 3),
        "skipped",
    ),
    Rule(
        "not finite",
        Severity.WARNING,
        "a metric is null, or counts values that are not finite",
        "an overflow or NaN in the forward or backward pass, or ratios that overflow",
        "definition",
        not_finite,
        "",
    ),
    Rule(
        "outside its healthy range",
        Severity.WARNING,
        "a metric leaves the healthy range that its declaration gives (docs/metrics.md)",
        "the declaration says why",
        "the declaration of the metric",
        unhealthy,
        "",
    ),
    _bound(
        "experts change",
        _CHANGE,
        0.04,
        "the routers of pi_theta choose other experts than those of pi_old, so ratios compare other networks",
        "the demo: at most 0.018 in 240 healthy optimizer steps, 0.07 to 0.13 in the steps in which three runs with "
        "too large a learning rate collapsed; GSPO [2507.18071] reports about 0.1 for 48 layers",
    ),
    _bound(
        "updates drift",
        "kl/old_policy/k3",
        0.05,
        "the mini-batches of one step move pi_theta far from the policy that sampled",
        "the demo: at most 0.0056 in 240 healthy optimizer steps; the bound is our choice",
    ),
    _bound(
        "engines disagree",
        "kl/rollout_old/k3",
        0.015,
        "the rollout engine samples from another policy than the trainer computes",
        "ten times what R3 [2510.11370] reports for a model of 30B without replay, 1.5e-3",
    ),
    _bound(
        "heavy tail of rho",
        "rho/beyond_2",
        1e-3,
        "tokens whose probabilities in the two engines differ by more than a factor of two dominate the gradient",
        "four times what R3 [2510.11370] reports without replay, 2.54e-4",
    ),
    Rule(
        "almost all tokens beyond the clip",
        Severity.WARNING,
        "clip/low/any/token + clip/high/any/token > 0.9",
        "almost every ratio has left the band, so the clip decides which tokens are trained on",
        "the demo with GSPO: at most 0.65 in 240 healthy optimizer steps; GSPO [2507.18071] shows about 0.15",
        lambda lines, _: beyond_band(lines, 0.9),
        "clip/low/any/token",
    ),
    Rule(
        "entropy collapse",
        Severity.WARNING,
        "entropy/mean below a tenth of the first",
        "the policy hardly explores, so that groups become dead",
        "DAPO [2503.14476, section 3.1] describes the collapse; a tenth is our choice",
        lambda lines, _: entropy_gone(lines, 0.1),
        "entropy/mean",
    ),
    _bound(
        "responses cut",
        "rollout/truncated",
        0.5,
        "the limit on the length ends most responses, so rewards say little of the answers",
        "definition; the bound is our choice",
    ),
    _bound(
        "groups dead",
        "rollout/group/dead",
        0.9,
        "almost no group has a gradient",
        "DAPO [2503.14476, section 3.2] samples more instead; the bound is our choice",
    ),
)
