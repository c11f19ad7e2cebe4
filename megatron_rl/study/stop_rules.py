"""Rules that end a run of a study early, and what they say of its lines so far. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.config.bounds import Frozen, Limits, NonNegativeInt, PositiveInt

Line = Mapping[str, Any]
Lines = Mapping[str, Sequence[Line]]
"""Lines by file: `metrics` and `eval`."""


class Fall(Frozen):
    """Stops if a metric has fallen below a part of its first value, which is above 0: with another it never stops."""

    kind: Literal["fall"]
    file: Literal["metrics", "eval"] = "eval"
    name: str
    to: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Beyond(Limits):
    """Stops if a metric is beyond its limits in so many consecutive lines; without limits, if it is not finite."""

    kind: Literal["beyond"]
    file: Literal["metrics", "eval"] = "metrics"
    name: str
    lines: PositiveInt = 1
    mini_batches: tuple[NonNegativeInt, ...] = ()
    """Mini-batches, from 0, whose lines count; none: all lines."""


StopRule = Annotated[Fall | Beyond, Field(discriminator="kind")]


def stop_reason(rules: Iterable[Fall | Beyond], lines: Lines) -> str:
    """Why the run is to stop after its last line: the first rule that says so, with its numbers; "" to go on.

    A line without the metric does not count.
    """
    for rule in rules:
        values = [
            (line["step"], line[rule.name]) for line in lines[rule.file] if rule.name in line and _counts(rule, line)
        ]
        if reason := _fallen(rule, values) if isinstance(rule, Fall) else _beyond(rule, values):
            return reason
    return ""


def _counts(rule: Fall | Beyond, line: Line) -> bool:
    return isinstance(rule, Fall) or not rule.mini_batches or line.get("mini_batch") in rule.mini_batches


def _fallen(rule: Fall, values: Sequence[tuple[int, float | None]]) -> str:
    if len(values) < 2:
        return ""
    (_, first), (step, last) = values[0], values[-1]
    if first is None or first <= 0 or (last is not None and last >= rule.to * first):
        return ""
    return f"fall: {rule.name} is {_shown(last)} after step {step}, below {rule.to:g} of its first value {first:.6g}"


def _beyond(rule: Beyond, values: Sequence[tuple[int, float | None]]) -> str:
    latest = values[-rule.lines :]
    if len(latest) < rule.lines or not all(rule.are_passed_by(value) for _, value in latest):
        return ""
    bounds = (("above", rule.above), ("below", rule.below))
    bound = " or ".join(f"{word} {number:g}" for word, number in bounds if number is not None) or "not finite"
    step, last = latest[-1]
    return f"beyond: {rule.name} is {_shown(last)} in step {step}, and {bound} in {rule.lines} consecutive lines"


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
