"""Compares an answer with the reference. Numbers are compared exactly; decimals are the one exception."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import sympy
from sympy import Integer, Rational, S

from megatron_rl.rewards.math.units import Unit
from megatron_rl.rewards.math.values import (
    Chain,
    Equation,
    Inequality,
    Interval,
    Named,
    Quantity,
    Several,
    Special,
    Union,
    Value,
    Word,
)

FEWEST_DIGITS = 6
"""Significant digits from which a decimal may stand for a number that it is rounded or cut from."""
_PRECISION = 60  # decimal digits
_MOST_BITS = 100_000  # of a number that is computed exactly
_LARGEST_FACTORIAL = 5_000
# One number for each symbol, by the order of their names.
_POINTS = (
    (Rational(17, 10), Rational(23, 7), Rational(5, 3), Rational(31, 9)),
    (Rational(-13, 7), Rational(-8, 5), Rational(-29, 11), Rational(-9, 4)),
    (Rational(3, 11), Rational(2, 13), Rational(4, 9), Rational(5, 17)),
    (Rational(-2, 7), Rational(19, 6), Rational(-3, 8), Rational(41, 10)),
    (Rational(61, 12), Rational(-7, 9), Rational(47, 13), Rational(-1, 6)),
    (Integer(3), Integer(5), Integer(2), Integer(7)),
    (Integer(8), Integer(4), Integer(9), Integer(6)),
)
_FEWEST_POINTS = 3


class TooLargeError(ArithmeticError):
    """The number would take too long to compute."""


def right(reference: Sequence[Value], answer: Sequence[Value]) -> bool:
    """Whether a reading of the answer equals a reading of the reference."""
    return any(_equal_or_not(one, other) for one, other in product(reference, answer))


def _equal_or_not(reference: Value, answer: Value) -> bool:
    """Whether the two are equal; False if sympy cannot compute it."""
    try:
        return _equal(reference, answer)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False


def _equal(reference: Value, answer: Value) -> bool:
    if isinstance(reference, Named) and isinstance(answer, Named):
        if reference.name.lower() == answer.name.lower():
            return _equal(reference.value, answer.value)
        return _equal_equations(_equation(reference), _equation(answer))
    if {type(reference), type(answer)} == {Equation, Named}:
        return _equal_equations(_equation(reference), _equation(answer))
    if isinstance(reference, Named):
        return _equal(reference.value, answer)
    if isinstance(answer, Named):
        return _equal(reference, answer.value)
    if isinstance(answer, Chain):
        return _equal_chain(reference, answer)
    if isinstance(reference, Chain):
        return any(_equal(part, answer) for part in reference.parts)
    if isinstance(reference, Equation) or isinstance(answer, Equation):
        return isinstance(reference, Equation) and isinstance(answer, Equation) and _equal_equations(reference, answer)
    if isinstance(reference, Word) or isinstance(answer, Word):
        return reference == answer
    if isinstance(reference, Quantity) and isinstance(answer, Quantity):
        return _equal_quantities(reference, answer)
    if isinstance(reference, Inequality) and isinstance(answer, Inequality):
        names, others = (set().union(*(p.value.free_symbols for p in each.parts)) for each in (reference, answer))
        if names != others:
            return False
        if len(names) > 1:
            return _equal_half_planes(reference, answer)
    if _is_region(reference) and _is_region(answer):
        return bool(_region(reference) == _region(answer))
    if isinstance(reference, Several | Quantity) and isinstance(answer, Several | Quantity):
        return _equal_several(_as_several(reference), _as_several(answer))
    return False


# ---- several values


def _as_several(value: Several | Quantity) -> Several:
    if isinstance(value, Several):
        return value
    if isinstance(value.value, sympy.MatrixBase) and 1 in value.value.shape:
        return Several("tuple", tuple(map(Quantity, value.value.flat())))
    return Several("list", (value,))


def _equal_several(reference: Several, answer: Several) -> bool:
    kinds = {reference.kind, answer.kind}
    if not kinds & {"tuple", "row"}:
        return _equal_sets(_distinct(reference.items), _distinct(answer.items))
    if (
        kinds not in ({"tuple"}, {"row"}, {"tuple", "list"}, {"row", "list"})
        or len(reference.items) != len(answer.items)
        or len(answer.items) < 2
    ):
        return False
    pairs = zip(_by_name(reference.items), _by_name(answer.items), strict=True)
    return all(_equal_or_not(one, other) for one, other in pairs)


def _by_name(items: Sequence[Value]) -> Sequence[Value]:
    """The items sorted by name if all of them are named: y = 3, x = 2 counts as (2, 3)."""
    named = [item for item in items if isinstance(item, Named)]
    if len(named) < len(items):
        return items
    return sorted(named, key=lambda item: item.name)


def _distinct(items: Sequence[Value]) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(_equal_or_not(one, item) for one in kept):
            kept.append(item)
    return kept


def _equal_sets(reference: list[Value], answer: list[Value]) -> bool:
    if len(reference) != len(answer):
        return False
    left = list(answer)
    for one in reference:
        found = next((other for other in left if _equal_or_not(one, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _equal_chain(reference: Value, answer: Chain) -> bool:
    """Whether one part equals the reference and no part contradicts it.

    The other parts must be equal, or agree as far as their digits go.
    """
    return any(_equal_or_not(reference, part) for part in answer.parts) and all(
        _equal_or_not(reference, part) or _equal_or_not(_unfinished(reference), part) or _is_near(reference, part)
        for part in answer.parts
    )


def _unfinished(value: Value) -> Value:
    """The same value, marked so that an answer may leave something to compute."""
    return Quantity(value.value, False, unit=value.unit) if isinstance(value, Quantity) else value


def _is_near(reference: Value, part: Quantity) -> bool:
    if not isinstance(reference, Quantity) or (part.last_place is None and reference.last_place is None):
        return False
    one, other = (_computed(each.value) for each in (reference, part))
    place = max(each.last_place for each in (reference, part) if each.last_place is not None)
    return bool(sympy.N(abs(one - other), 20) <= Rational(10) ** place)


# ---- regions of the real line


def _is_region(value: Value) -> bool:
    if isinstance(value, Several):
        return value.kind in ("list", "or") and all(map(_is_region, value.items))
    if isinstance(value, Named):
        return _is_region(value.value)
    return isinstance(value, Interval | Union | Special | Inequality)


def _region(value: Value) -> sympy.Set:
    if isinstance(value, Named):
        return _region(value.value)
    if isinstance(value, Special):
        return S.Reals if value.name == "reals" else S.EmptySet
    if isinstance(value, Interval):
        low, high = _computed(value.low.value), _computed(value.high.value)
        if not (low.is_extended_real and high.is_extended_real) or not bool(low <= high):
            raise ValueError("no interval")
        return sympy.Interval(low, high, value.low_open, value.high_open)
    if isinstance(value, Union):
        return sympy.Union(*(_region(part) for part in value.parts))
    if isinstance(value, Several) and value.kind in ("set", "list", "or"):
        if all(isinstance(item, Quantity) for item in value.items):
            return sympy.FiniteSet(*(_computed(item.value) for item in value.items if isinstance(item, Quantity)))
        regions = [_region(item) for item in value.items]
        both = sympy.Intersection(*regions)
        return sympy.Union(*regions) if value.kind == "or" or both is S.EmptySet else both
    if isinstance(value, Quantity):
        return sympy.FiniteSet(_computed(value.value))
    if isinstance(value, Inequality):
        sets = [_solved(*triple) for triple in zip(value.parts[:-1], value.relations, value.parts[1:], strict=True)]
        return sympy.Intersection(*sets)
    raise ValueError("no region")


def _solved(left: Quantity, relation: str, other: Quantity) -> sympy.Set:
    one, two = _computed(left.value), _computed(other.value)
    if relation == "!=":
        return sympy.Complement(S.Reals, sympy.Eq(one, two).as_set())
    return sympy.Rel(one, two, relation).as_set()


def _equal_half_planes(reference: Inequality, answer: Inequality) -> bool:
    """Whether two inequalities in several variables, of one relation each, differ by a positive factor only."""
    if len(reference.relations) != 1 or len(answer.relations) != 1:
        return False
    (one, first), (two, second) = (_below_zero(each) for each in (reference, answer))
    ratio = sympy.simplify(one / two)
    return first == second and bool(ratio.is_number and ratio.is_positive)


def _below_zero(value: Inequality) -> tuple[sympy.Expr, str]:
    relation = value.relations[0]
    sides = [_computed(part.value) for part in value.parts]
    if relation[0] == ">":
        sides.reverse()
    return sides[0] - sides[1], relation.replace(">", "<")


# ---- equations


def _equation(value: Value) -> Equation:
    if isinstance(value, Equation):
        return value
    if not isinstance(value, Named) or not isinstance(value.value, Quantity):
        raise ValueError("no equation")
    return Equation(Quantity(sympy.Symbol(value.name.lower(), real=True)), value.value)


def _equal_equations(reference: Equation, answer: Equation) -> bool:
    """Whether one equation is the other times a number. x = 2 and y = 2 are different."""
    one, two = (_computed(each.left.value) - _computed(each.right.value) for each in (reference, answer))
    if one.free_symbols != two.free_symbols or not one.free_symbols:
        return False
    ratio = sympy.simplify(one / two)
    return bool(ratio.is_number and ratio.is_nonzero and ratio.is_finite)


# ---- quantities


def _equal_quantities(reference: Quantity, answer: Quantity) -> bool:
    one, two = reference.value, answer.value
    if isinstance(one, sympy.MatrixBase) or isinstance(two, sympy.MatrixBase):
        return _equal_matrices(one, two)
    one, two = _computed(one), _computed(two)
    if not one.free_symbols and not two.free_symbols:
        if _is_number(reference) and not answer.finished and reference.unit == answer.unit:
            return False
        scales = _scales(reference.unit, answer.unit, two)
        return any(
            _equal_numbers(one * a, two * b) or (a == b == 1 and _is_rounded(reference, answer)) for a, b in scales
        )
    if reference.unit is not None and answer.unit is not None and reference.unit != answer.unit:
        return False
    return _same_function(one, two)


def _is_number(value: Quantity) -> bool:
    """Whether it is a single number with nothing left to compute."""
    return value.finished and not value.value.free_symbols and isinstance(value.value, sympy.Rational)


def _scales(reference: Unit | None, answer: Unit | None, value: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Pairs of factors by which the two numbers may be multiplied before they are compared."""
    one = Integer(1)
    if reference is None and answer is None:
        return [(one, one)]
    if reference is not None and answer is not None:
        if reference == answer:
            return [(one, one)]
        return [(reference.factor, answer.factor)] if reference.dimension == answer.dimension else []
    if reference is not None:
        return [(one, one), (reference.factor, one)] if reference.is_ratio else [(one, one)]
    assert answer is not None
    if not answer.is_ratio:
        return [(one, one)]
    # 50% for 50, but not 0.5% for 0.5, which is more likely a probability.
    return [(one, answer.factor), *([(one, one)] if abs(sympy.N(value)) > 1 else [])]


def _equal_matrices(one: sympy.Basic, two: sympy.Basic) -> bool:
    if not isinstance(one, sympy.MatrixBase) or not isinstance(two, sympy.MatrixBase) or one.shape != two.shape:
        return False
    return all(_same_function(_computed(a), _computed(b)) for a, b in zip(one.flat(), two.flat(), strict=True))


def _equal_numbers(one: sympy.Expr, two: sympy.Expr) -> bool:
    if one == two:
        return True
    if (one.is_Rational and two.is_Rational) or not (one.is_finite is not False and two.is_finite is not False):
        return False
    first, second = sympy.N(one, _PRECISION), sympy.N(two, _PRECISION)
    size = max(abs(first), abs(second))
    return bool(abs(first - second) <= size * Rational(1, 10 ** (_PRECISION // 2)))


def _is_rounded(reference: Quantity, answer: Quantity) -> bool:
    """Whether the number with fewer digits is the other number, rounded or cut off at its last digit."""
    decimals = [each for each in (reference, answer) if each.last_place is not None]
    if not decimals:
        return False
    rough = min(decimals, key=lambda each: each.digits)
    exact = _computed((answer if rough is reference else reference).value)
    value = _computed(rough.value)
    if rough.digits < FEWEST_DIGITS or value.is_integer or exact.is_integer is not False or not exact.is_real:
        return False
    place = Rational(10) ** rough.last_place
    steps = sympy.N(abs(exact), _PRECISION) / place
    return bool(exact * value > 0) and abs(value) / place in (sympy.floor(steps), sympy.floor(steps + Rational(1, 2)))


def _same_function(one: sympy.Expr, two: sympy.Expr) -> bool:
    """Whether two expressions agree at enough points, at which both are real."""
    if one == two:
        return True
    symbols = sorted(one.free_symbols | two.free_symbols, key=lambda symbol: symbol.name)
    if not symbols:
        return _equal_numbers(one, two)
    compared = 0
    for point in _POINTS:
        at = {symbol: point[k % len(point)] + k // len(point) for k, symbol in enumerate(symbols)}
        first, second = (sympy.N(_computed(each.xreplace(at)), _PRECISION) for each in (one, two))
        if not (first.is_finite and second.is_finite and first.is_number and second.is_number):
            continue
        if not one.has(sympy.I) and not two.has(sympy.I) and not (first.is_real and second.is_real):
            continue
        if not _equal_numbers(first, second):
            return False
        compared += 1
    return compared >= _FEWEST_POINTS


def _computed(value: sympy.Expr) -> sympy.Expr:
    """Computes the value from the leaves up. Raises TooLargeError before a power or factorial that is too large."""
    if not value.args:
        return value
    if isinstance(value, sympy.Sum | sympy.Product | sympy.Integral | sympy.Limit | sympy.Derivative):
        return value.doit()
    args = [_computed(arg) for arg in value.args]
    if isinstance(value, sympy.Pow) and all(arg.is_number for arg in args):
        _check_power(*args)
    if isinstance(value, sympy.factorial) and args[0].is_number and not bool(abs(args[0]) <= _LARGEST_FACTORIAL):
        raise TooLargeError("factorial")
    if isinstance(value, sympy.Basic) and value.func.__name__ == "UnevaluatedExpr":
        return args[0]
    return value.func(*args)


def _check_power(base: sympy.Expr, exponent: sympy.Expr) -> None:
    if base.is_Rational:
        bits = max(int(base.p).bit_length(), int(base.q).bit_length())
    else:
        bits = int(abs(sympy.N(base, 15)) + 1).bit_length()
    if not bool(bits * abs(sympy.N(exponent, 15)) <= _MOST_BITS):
        raise TooLargeError("power")
