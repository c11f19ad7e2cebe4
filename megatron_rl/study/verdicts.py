"""What a decision rule says of the results of a study. Pure; imports no torch.

A rule about an estimate, a mean over seeds with a standard error, holds if the estimate is in its band and the interval
of +-2 standard errors does not reach into the opposite band; if it does, the study is underpowered. A rule about seeds
holds if enough of them are in its band. The standard error over seeds is that of a mean, s / sqrt(n).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.study.decision_rules import (
    AllRule,
    AnyRule,
    Band,
    DifferenceRule,
    EdgeShiftRule,
    GridEdgeRule,
    NoRule,
    Rule,
    ShareRule,
    SlopeRule,
    ThresholdRule,
    Where,
)
from megatron_rl.study.edges import Edge, edge_slope, find_edge
from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.power_law import PowerLaw, fit

RuleVerdict = Literal["confirmed", "refuted", "undecided", "underpowered", "none"]
INTERVAL = 2.0
"""Half-width, in standard errors, of the interval around an estimate."""
Results = Sequence[RunOutcome]


@dataclass(frozen=True)
class Judgement:
    verdict: RuleVerdict
    text: str
    """The verdict's reason in one sentence."""
    numbers: dict[str, Any] = field(default_factory=dict)


def judge(rule: Rule, results: Results) -> Judgement:
    """Evaluates a rule on the results of all runs."""
    match rule:
        case DifferenceRule():
            return _difference(rule, results)
        case SlopeRule():
            return _of_lines(rule, _lines(rule, results))
        case ShareRule():
            return _by_seed(rule, "share", _shares(rule, results))
        case ThresholdRule():
            return _by_seed(rule, rule.metric, _values(results, rule.arm, rule.metric))
        case GridEdgeRule():
            return _grid_edge(rule, results)
        case EdgeShiftRule():
            return _by_seed(rule, "grid steps", _edge_shifts(rule, results))
        case AllRule():
            return _together(rule.of, results, holds=all, fails=any)
        case AnyRule():
            return _together(rule.of, results, holds=any, fails=all)
        case NoRule():
            return Judgement("none", "an exploration, which decides nothing")


# ---- from numbers to verdicts ----------------------------------------------------------------------------------


def decide(estimate: float, error: float, confirms: Band, refutes: Band | None) -> RuleVerdict:
    """The verdict on an estimate with its standard error; 0: a number that is exact."""
    low, high = estimate - INTERVAL * error, estimate + INTERVAL * error
    is_open = refutes is not None and refutes.touches(low, high)
    if confirms.holds(estimate):
        return "underpowered" if is_open else "confirmed"
    if refutes is not None and refutes.holds(estimate):
        return "underpowered" if confirms.touches(low, high) else "refuted"
    return "underpowered" if is_open or confirms.touches(low, high) else "undecided"


def decide_by_seed(
    values: Mapping[int, float | None], confirms: Band, refutes: Band | None, needed: int | None
) -> RuleVerdict:
    """The verdict on one value for each seed, of which `needed` must agree (None: all).

    A seed without a value, as of a failed run, agrees with nothing; if it could have changed the verdict, that is
    underpowered. If enough seeds agree on either, nothing is decided.
    """
    needed = needed or len(values)
    there = [value for value in values.values() if value is not None]
    missing = len(values) - len(there)
    confirming = sum(confirms.holds(value) for value in there)
    refuting = sum(refutes is not None and refutes.holds(value) for value in there)
    if not values or len(values) < needed:
        return "underpowered"
    could_confirm = confirming + missing >= needed
    could_refute = refutes is not None and refuting + missing >= needed
    if confirming >= needed and refuting >= needed:
        return "undecided"
    if confirming >= needed and not could_refute:
        return "confirmed"
    if refuting >= needed and not could_confirm:
        return "refuted"
    return "underpowered" if could_confirm or could_refute else "undecided"


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def _of_lines(rule: SlopeRule | GridEdgeRule, lines: Mapping[int, PowerLaw | None]) -> Judgement:
    """The verdict on the mean slope of the seeds' lines.

    Seeds can agree on a slope although their points lie on no line, or although a grid is too coarse to tell. So the
    error is not below the mean of the lines' own.
    """
    values = [line.slope for line in lines.values() if line is not None]
    numbers: dict[str, Any] = {"by_seed": {str(seed): line and line.slope for seed, line in lines.items()}}
    needed = rule.min_seeds or max(len(lines), 2)
    if len(values) < needed:
        return Judgement("underpowered", f"{len(values)} seeds have a slope, the rule needs {needed}", numbers)
    mean = statistics.fmean(values)
    errors = [standard_error(values)] if len(values) > 1 else []
    if own := [line.error for line in lines.values() if line is not None and line.error is not None]:
        errors.append(statistics.fmean(own))
        numbers["error_of_the_fit"] = errors[-1]
    error = max(errors, default=None)
    numbers |= {"slope": mean, "standard_error": error}
    verdict = decide(mean, error or 0.0, rule.confirms, rule.refutes)
    spread = f" +- {error:.3g}" if error is not None else ""
    text = f"slope {mean:.3g}{spread} over {len(values)} seeds; {_bands(rule.confirms, rule.refutes)}"
    return Judgement(verdict, text, numbers)


def _by_seed(
    rule: ShareRule | ThresholdRule | EdgeShiftRule, what: str, by_seed: Mapping[int, float | None]
) -> Judgement:
    needed = rule.seeds
    verdict = decide_by_seed(by_seed, rule.confirms, rule.refutes, needed)
    values = [value for value in by_seed.values() if value is not None]
    listed = ", ".join("none" if value is None else f"{value:.3g}" for value in by_seed.values()) or "no seed"
    text = (
        f"{what} by seed: {listed}; {_bands(rule.confirms, rule.refutes)}, in {needed or 'all'} of {len(by_seed)} seeds"
    )
    if len(values) < (least := rule.min_seeds or 2):
        verdict, text = "underpowered", f"{text}; the rule needs {least} seeds with a number"
    mean = statistics.fmean(values) if values else None
    error = standard_error(values) if len(values) > 1 else None
    return Judgement(verdict, text, {"by_seed": _keyed(by_seed), "mean": mean, "standard_error": error})


def _bands(confirms: Band, refutes: Band | None) -> str:
    return f"{_span(confirms)} confirms" + (f", {_span(refutes)} refutes" if refutes else "")


def _span(band: Band) -> str:
    if band.min is None:
        return f"at most {band.max:g}"
    return f"at least {band.min:g}" if band.max is None else f"{band.min:g} to {band.max:g}"


def _keyed(by_seed: Mapping[int, Any]) -> dict[str, Any]:
    return {str(seed): value for seed, value in by_seed.items()}


def _together(
    rules: Sequence[Rule],
    results: Results,
    *,
    holds: Callable[[Iterable[bool]], bool],
    fails: Callable[[Iterable[bool]], bool],
) -> Judgement:
    judgements = [judge(rule, results) for rule in rules]
    verdicts = [each.verdict for each in judgements]
    verdict: RuleVerdict = "undecided"
    if holds(each == "confirmed" for each in verdicts):
        verdict = "confirmed"
    elif fails(each == "refuted" for each in verdicts):
        verdict = "refuted"
    elif "underpowered" in verdicts:
        verdict = "underpowered"
    parts = [{"verdict": each.verdict, "text": each.text, "numbers": each.numbers} for each in judgements]
    return Judgement(verdict, "; ".join(f"{each.verdict}: {each.text}" for each in judgements), {"of": parts})


# ---- from results to numbers -----------------------------------------------------------------------------------


def _values(results: Results, arm: str, metric: str) -> dict[int, float | None]:
    """The metric by seed, for all seeds of the arm; None for a failed run or a missing number."""
    return {each.seed: each.metrics.get(metric) if each.has_values else None for each in results if each.arm == arm}


def _pairs(results: Results, one: str, other: str, metric: str) -> dict[int, tuple[float | None, float | None]]:
    """The metric of two arms, for the seeds that both have."""
    first, second = _values(results, one, metric), _values(results, other, metric)
    return {seed: (first[seed], second[seed]) for seed in first if seed in second}


def _difference(rule: DifferenceRule, results: Results) -> Judgement:
    sides = [_values(results, arm, rule.metric) for arm in rule.arms]
    seeds = [len(side) for side in sides]
    if rule.paired:
        pairs = _pairs(results, rule.arm, rule.against, rule.metric)
        samples = [[a - b for a, b in pairs.values() if a is not None and b is not None]]
        seeds = [len(pairs)]
    else:
        samples = [[value for value in side.values() if value is not None] for side in sides]
    by_seed = {arm: _keyed(side) for arm, side in zip(rule.arms, sides, strict=True)}
    numbers: dict[str, Any] = {"by_seed": by_seed}
    for sample, each in zip(samples, seeds, strict=True):
        if len(sample) < (needed := max(rule.min_seeds or each, 2)):
            return Judgement("underpowered", f"{len(sample)} seeds have values, the rule needs {needed}", numbers)
    means = [statistics.fmean(sample) for sample in samples]
    difference = means[0] if rule.paired else means[0] - means[1]
    error = _error_of_difference(rule, results, samples)
    in_errors = _in_errors(difference, error)
    numbers |= {"difference": difference, "standard_error": error, "in_standard_errors": in_errors}
    text = f"{rule.metric} of {rule.arm} minus {rule.against}: {difference:.3g} +- {error:.3g}"
    if rule.max_error is not None and error > rule.max_error:
        return Judgement("underpowered", f"{text}; the rule needs a standard error of {rule.max_error:g}", numbers)
    if rule.unit == "absolute":
        verdict = decide(difference, error, rule.confirms, rule.refutes)
        return Judgement(verdict, f"{text}; {_bands(rule.confirms, rule.refutes)}", numbers)
    verdict = decide(in_errors, 0.0, rule.confirms, rule.refutes)
    text = f"{text}, {in_errors:.3g} standard errors; {_bands(rule.confirms, rule.refutes)}"
    return Judgement(verdict, text, numbers)


def _error_of_difference(rule: DifferenceRule, results: Results, samples: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of the paired differences, or of the difference of two means, without the
    assumption of equal variances.

    The values' own standard errors, as of an evaluation, are part of their spread over seeds. A spread of few seeds may
    come out too small by chance, so the error is at least that of the values.
    """
    own = []
    for arm in rule.arms:
        errors = [each.errors.get(rule.metric) for each in results if each.arm == arm and each.has_values]
        known = [error**2 for error in errors if error is not None]
        own.append(statistics.fmean(known) if known else 0.0)
    floors = [sum(own)] if rule.paired else own
    variances = [
        max(standard_error(sample) ** 2, floor / len(sample)) for sample, floor in zip(samples, floors, strict=True)
    ]
    return math.sqrt(sum(variances))


def _in_errors(difference: float, error: float) -> float:
    """The difference in standard errors; without spread the largest float of its sign, or 0."""
    if error == 0.0:
        return math.copysign(1.7e308, difference) if difference else 0.0
    return difference / error


def _shares(rule: ShareRule, results: Results) -> dict[int, float | None]:
    pairs = _pairs(results, rule.of, rule.without, rule.metric)
    return {seed: 1 - b / a if a and b is not None else None for seed, (a, b) in pairs.items()}


def _matches(outcome: RunOutcome, where: Where) -> bool:
    return all(outcome.at.get(factor) == value for factor, value in where.items())


def _lines(rule: SlopeRule, results: Results) -> dict[int, PowerLaw | None]:
    """The line by seed; None if one of the seed's runs lacks a number."""
    lines: dict[int, PowerLaw | None] = {}
    for seed in _seeds(results):
        runs = _selected(results, seed, rule.where)
        y = [each.metrics.get(rule.metric) if each.has_values else None for each in runs]
        x = [each.metrics.get(rule.x_metric) if rule.x_metric else each.at.get(rule.x_factor or "") for each in runs]
        known_x = [float(each) for each in x if isinstance(each, int | float)]
        known_y = [each for each in y if each is not None]
        if runs:
            whole = len(known_x) == len(known_y) == len(runs)
            lines[seed] = fit(known_x, known_y) if whole else None
    return lines


def _seeds(results: Results) -> list[int]:
    return list(dict.fromkeys(each.seed for each in results))


# ---- edges of stability ----------------------------------------------------------------------------------------


def _grid_edge(rule: GridEdgeRule, results: Results) -> Judgement:
    edges: dict[int, dict[float, Edge]] = {}
    for each in results:
        if _matches(each, rule.where) and rule.over in each.at:
            edges.setdefault(each.seed, {})[float(each.at[rule.over])] = Edge(-1, ())
    for seed, by_x in edges.items():
        for x in by_x:
            by_x[x] = find_edge(_selected(results, seed, {**rule.where, rule.over: x}), rule.along)
    lines = {seed: edge_slope(by_x) for seed, by_x in edges.items()}
    judgement = _of_lines(rule, lines)
    shown = {seed: {f"{x:g}": _edge_shown(e) for x, e in sorted(by_x.items())} for seed, by_x in edges.items()}
    return Judgement(judgement.verdict, judgement.text, judgement.numbers | {"edges": _keyed(shown)})


def _edge_shown(edge: Edge) -> float | str:
    if edge.is_inside:
        return edge.values[edge.index]
    if not edge.values:
        return "not known"
    return "above the grid" if edge.is_top else "below the grid"


def _selected(results: Results, seed: int, where: Where) -> list[RunOutcome]:
    return [each for each in results if each.seed == seed and _matches(each, where)]


def _edge_shifts(rule: EdgeShiftRule, results: Results) -> dict[int, float | None]:
    shifts: dict[int, float | None] = {}
    for seed in _seeds(results):
        runs = [_selected(results, seed, {**rule.where, rule.factor: each}) for each in (rule.value, rule.against)]
        if all(runs):
            one, other = (find_edge(each, rule.along) for each in runs)
            shifts[seed] = _shift(rule, one, other) if one.values == other.values else None
    return shifts


def _shift(rule: EdgeShiftRule, one: Edge, other: Edge) -> float | None:
    """The shift; if an edge is beyond an end of its grid, the least or largest one, if it decides, else None."""
    low, high = one.bounds[0] - other.bounds[1], one.bounds[1] - other.bounds[0]
    bands = [band for band in (rule.confirms, rule.refutes) if band is not None]
    if low != high and not any(band.contains(low, high) for band in bands):
        return None
    return low if math.isfinite(low) else high
