"""Decision rules as a study file declares them; verdicts.py evaluates them. Imports no torch.

A rule makes numbers of the runs, and bands say what these mean: in `confirms` the hypothesis holds, in `refutes` it
does not, and between them the study does not decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.bounds import Frozen, Positive, PositiveInt

Where = dict[str, int | float | str]
"""Coordinates that an arm must have."""


class Band(Frozen):
    """Numbers from `min` to `max`, bounds included; null: without bound."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Band:
        if self.min is None and self.max is None:
            raise ValueError("a band with `min`, `max` or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("`min` below `max`")
        return self

    def holds(self, value: float) -> bool:
        return self.touches(value, value)

    def contains(self, low: float, high: float) -> bool:
        """Whether all numbers of low..high are in the band; an end may be infinite."""
        return (self.min is None or low >= self.min) and (self.max is None or high <= self.max)

    def touches(self, low: float, high: float) -> bool:
        """Whether the band has a number in common with low..high."""
        return (self.min is None or high >= self.min) and (self.max is None or low <= self.max)


class DecisionRule(Frozen):
    """What the kinds have in common: the names that a rule refers to."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    @property
    def arms(self) -> tuple[str, ...]:
        return ()

    @property
    def factors(self) -> tuple[str, ...]:
        """Coordinates that arms must have."""
        return ()


class Banded(DecisionRule):
    confirms: Band
    refutes: Band | None = None
    min_seeds: PositiveInt | None = None
    """Seeds that must have a number. Defaults to null: all, and at least 2; two of those that are counted by seed."""

    @model_validator(mode="after")
    def _check_bands(self) -> Banded:
        one, other = self.confirms, self.refutes
        if other is not None and other.touches(_or(one.min, float("-inf")), _or(one.max, float("inf"))):
            raise ValueError("`confirms` and `refutes` without a number in common")
        return self


class OfMetric(Banded):
    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)


class BySeed(Banded):
    seeds: PositiveInt | None = None
    """Number of seeds that must agree; null: all."""


class DifferenceRule(OfMetric):
    """Mean of one arm over seeds minus that of another, in standard errors or as it is."""

    kind: Literal["difference"]
    arm: str
    against: str
    unit: Literal["standard_errors", "absolute"] = "standard_errors"
    paired: bool = False
    """Take the difference seed by seed; the standard error is then that of the differences."""
    max_error: Positive | None = None
    """A larger standard error makes the verdict underpowered. Set it if equality confirms."""

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.against


class SlopeRule(OfMetric):
    """Least-squares slope of log `metric` on log x over arms, for each seed; x is a metric or a coordinate."""

    kind: Literal["slope"]
    x_metric: str | None = None
    x_factor: str | None = None
    where: Where = Field(default_factory=dict)
    """Coordinates of the arms that count."""

    @model_validator(mode="after")
    def _check_x(self) -> SlopeRule:
        if (self.x_metric is None) == (self.x_factor is None):
            raise ValueError("either `x_metric` or `x_factor`")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric, self.x_metric) if self.x_metric else (self.metric,)

    @property
    def factors(self) -> tuple[str, ...]:
        return (*self.where, *((self.x_factor,) if self.x_factor else ()))


class ShareRule(OfMetric, BySeed):
    """1 - a/b for each seed: the part of `metric` of arm `of` that is gone in `without`."""

    kind: Literal["share"]
    of: str
    without: str

    @property
    def arms(self) -> tuple[str, ...]:
        return self.of, self.without


class ThresholdRule(OfMetric, BySeed):
    """`metric` of one arm, for each seed."""

    kind: Literal["threshold"]
    arm: str

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)


class GridEdgeRule(Banded):
    """Slope of log edge on log `over`, for each seed. The edge is the largest `along` of which no run, nor one of a
    smaller `along`, was stopped or failed."""

    kind: Literal["grid_edge"]
    along: str
    over: str
    where: Where = Field(default_factory=dict)

    @property
    def factors(self) -> tuple[str, ...]:
        return self.along, self.over, *self.where


class EdgeShiftRule(BySeed):
    """Grid steps by which the edge along `along` differs between two values of `factor`, for each seed."""

    kind: Literal["edge_shift"]
    along: str
    factor: str
    value: int | float | str
    against: int | float | str
    where: Where = Field(default_factory=dict)

    @property
    def factors(self) -> tuple[str, ...]:
        return self.along, self.factor, *self.where


class AllRule(DecisionRule):
    """Confirmed if all rules are, refuted if one is."""

    kind: Literal["all"]
    of: Annotated[tuple[Rule, ...], Field(min_length=1)]


class AnyRule(DecisionRule):
    """Confirmed if one rule is, refuted if all are."""

    kind: Literal["any"]
    of: Annotated[tuple[Rule, ...], Field(min_length=1)]


class NoRule(DecisionRule):
    """Explores: nothing is decided."""

    kind: Literal["none"]


Rule = Annotated[
    DifferenceRule | SlopeRule | ShareRule | ThresholdRule | GridEdgeRule | EdgeShiftRule | AllRule | AnyRule | NoRule,
    Field(discriminator="kind"),
]
AllRule.model_rebuild()
AnyRule.model_rebuild()


def rules_within(key: str, rule: Rule) -> Iterator[tuple[str, Rule]]:
    """Yields the rule with its key, and the rules in it."""
    yield key, rule
    if isinstance(rule, AllRule | AnyRule):
        for number, inner in enumerate(rule.of):
            yield from rules_within(f"{key}.of.{number}", inner)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
