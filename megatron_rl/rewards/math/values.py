"""The values that an answer can have. A text may have several readings: "1,234" is one number, or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy

from megatron_rl.rewards.math.units import Certainty, Unit

Kind = Literal["list", "or", "set", "tuple", "row"]


@dataclass(frozen=True)
class Quantity:
    """A number or an expression with symbols, not evaluated."""

    value: sympy.Expr
    finished: bool = True  # False if there is something left to compute, as in 2 + 3
    last_place: int | None = None  # power of ten of the last written digit; None: exact
    digits: int = 0  # number of significant digits written
    unit: Unit | None = None
    certainty: Certainty | None = None  # of the unit


@dataclass(frozen=True)
class Several:
    """A list or a set; "or" is a list of alternatives. The order counts in a tuple (1, 2) and in a row [1, 2]."""

    kind: Kind
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Interval:
    low: Quantity
    high: Quantity
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Union:
    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Special:
    """The real numbers or the empty set."""

    name: Literal["reals", "empty"]


@dataclass(frozen=True)
class Inequality:
    """parts[0] relations[0] parts[1] ..., as in 1 < x <= 2."""

    parts: tuple[Quantity, ...]
    relations: tuple[str, ...]  # each one of < > <= >= !=


@dataclass(frozen=True)
class Equation:
    left: Quantity
    right: Quantity


@dataclass(frozen=True)
class Chain:
    """Quantities that the text calls equal, as in 1/2 = 0.5."""

    parts: tuple[Quantity, ...]


@dataclass(frozen=True)
class Named:
    """A value with a name, as in x = 5 or x in (1, 2)."""

    name: str
    value: Value


@dataclass(frozen=True)
class Word:
    """Text in lower case, compared letter by letter."""

    text: str


Value = Quantity | Several | Interval | Union | Special | Inequality | Equation | Chain | Named | Word
