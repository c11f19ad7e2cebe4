"""The math verifier on generated answers: verdicts match exact arithmetic, and only ValueError is raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from fuzzing import drawing
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.math import verify_math
from megatron_rl.rewards.verifiers import check_answer


def verdict(reference: str, response: str) -> bool:
    return verify_math(Prompt("", "", (), reference, "math"), response).correct


# ---- numbers, against fractions

numbers = st.one_of(
    st.integers(-10, 10).map(Fraction),
    st.integers(-(10**12), 10**12).map(Fraction),
    st.builds(Fraction, st.integers(-50, 50), st.integers(1, 12)),
    st.builds(lambda top, places: Fraction(top, 10**places), st.integers(-(10**6), 10**6), st.integers(0, 9)),
)


def decimal(value: Fraction) -> str | None:
    """Returns the value as a decimal, or None if it needs more than 20 places."""
    scaled = value * 10**20
    if scaled.denominator != 1:
        return None
    digits = str(abs(int(scaled))).rjust(21, "0")
    text = f"{digits[:-20]}.{digits[-20:]}".rstrip("0").rstrip(".")
    return ("-" if value < 0 else "") + text


def thousands(value: Fraction) -> str | None:
    return f"{int(value):,}" if value.denominator == 1 else None


def mixed(value: Fraction) -> str | None:
    whole, rest = divmod(abs(value), 1)
    if not whole or not rest:
        return None
    sign = "-" if value < 0 else ""
    return rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"


def scientific(value: Fraction) -> str | None:
    text = decimal(value * 1000)
    return None if text is None else rf"{text} \times 10^{{-3}}"


FORMS: dict[str, Callable[[Fraction], str | None]] = {
    "fraction": lambda v: rf"\frac{{{v.numerator}}}{{{v.denominator}}}",
    "not reduced": lambda v: rf"\dfrac{{{v.numerator * 3}}}{{{v.denominator * 3}}}",
    "slash": lambda v: f"{v.numerator}/{v.denominator}",
    "decimal": decimal,
    "thousands": thousands,
    "mixed": mixed,
    "scientific": scientific,
    "Unicode's minus": lambda v: (decimal(v) or str(v)).replace("-", "−"),
    "named": lambda v: f"x = {decimal(v) or v}",
    "set": lambda v: rf"\{{{decimal(v) or v}\}}",
    "in text": lambda v: rf"\text{{The answer is }} {decimal(v) or v}",
    "unit": lambda v: rf"{decimal(v) or v} \text{{ apples}}",
    "fullwidth": lambda v: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in decimal(v) or str(v)),
}
WRAPPERS = (r"\boxed{%s}", r"so $\boxed{%s}$.", r"<answer>%s</answer>", r"\fbox{%s}", "The answer is $%s$.")


def written_digits(form: str, value: Fraction) -> tuple[int, Fraction] | None:
    """Returns the number of digits of a decimal and the size of its last place, or None for exact forms."""
    shift = 3 if form == "scientific" else 0
    text = decimal(value * 10**shift)
    if text is None or form in ("fraction", "not reduced", "slash", "thousands", "mixed"):
        return None
    whole, _, after = text.lstrip("-").partition(".")
    if not after and not shift:
        return None
    return len((whole + after).lstrip("0")), Fraction(1, 10 ** (len(after) + shift))


def is_rounded(*both: tuple[Fraction, tuple[int, Fraction] | None]) -> bool:
    """Returns whether one number is the other, rounded or cut to six digits or more, and is no integer.

    docs/verifiers.md describes this rule.
    """
    decimals = [each for each in both if each[1] is not None]
    if not decimals:
        return False
    rough = min(decimals, key=lambda each: each[1][0])  # type: ignore[index]
    (other,) = [each[0] for each in both if each is not rough] or [rough[0]]
    assert rough[1] is not None
    value, (digits, place) = rough[0], rough[1]
    if digits < 6 or value.denominator == 1 or other.denominator == 1 or value * other <= 0:
        return False
    return abs(value) / place in (abs(other) // place, (abs(other) + place / 2) // place)


@st.composite
def number_cases(draw: st.DrawFn) -> tuple[str, str, bool]:
    """Draws reference, response, and whether their numbers are equal up to rounding."""
    one = draw(numbers)
    near = st.sampled_from([one + 1, -one, one * 10, one / 10, one + Fraction(1, 10**7), 1 / one if one else one])
    other = draw(st.one_of(st.just(one), near, numbers))
    texts, rough = [], []
    for value in (one, other):
        form = draw(st.sampled_from(sorted(FORMS)))
        texts.append(FORMS[form](value) or str(FORMS["fraction"](value)))
        rough.append(written_digits(form, value))
    equal = one == other or is_rounded((one, rough[0]), (other, rough[1]))
    return texts[0], draw(st.sampled_from(WRAPPERS)) % texts[1], equal


def check_number(case: tuple[str, str, bool]) -> str:
    reference, response, equal = case
    assert check_answer("math", reference) is None
    assert verdict(reference, response) == equal
    return "equal" if equal else "different"


# ---- polynomials, against their coefficients

Coefficients = dict[tuple[int, int], int]
polynomials = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 2)), st.integers(-9, 9).filter(bool), min_size=1, max_size=4
)


def polynomial(terms: list[tuple[tuple[int, int], int]], times: str) -> str:
    parts = []
    for (x, y), factor in terms:
        factors = [str(factor), *([f"x^{{{x}}}"] if x else []), *([f"y^{y}"] if y else [])]
        parts.append(times.join(factors))
    return "+".join(parts).replace("+-", "-")


@st.composite
def polynomial_cases(draw: st.DrawFn) -> tuple[str, str, bool]:
    one: Coefficients = draw(polynomials)
    other: Coefficients = dict(one)
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(one)))
        other[key] = draw(st.integers(-9, 9).filter(bool))
    orders = [draw(st.permutations(sorted(each.items()))) for each in (one, other)]
    texts = [polynomial(order, draw(st.sampled_from([" ", r" \cdot ", "*", "·"]))) for order in orders]
    return texts[0], rf"\boxed{{{texts[1]}}}", one == other


# ---- arbitrary text

_PIECES = r"""
    \boxed{ \fbox{ } { ( ) [ ] \{ \} $ $$ \( \) \[ \] \frac \dfrac{1}{2} \sqrt \sqrt[3] ^ _ ^{ = < > \le \ne , ; . .. :
    ! \% % \text{ or and not is the answer: #### <answer> </answer> <think> </think> ~~ \cancel{ 0 1 -7 12 3.5 1,000 1e5
    x y e i \pi \infty \pm \cup \in \mathbb{R} \begin{pmatrix} \end{pmatrix} & \\ \ ½ √ − ² ° １ € cm dollars A (B) \log
    \sin \binom \sum_{k=1}^{3} \int f(x) \left \right \circ * / + - '
"""
FRAGMENTS = _PIECES.split()
fragments = st.lists(st.sampled_from([*FRAGMENTS, " ", "\n"]), max_size=12).map("".join)
anything = st.one_of(fragments, st.text(max_size=30), fragments.map(lambda text: rf"\boxed{{{text}}}"))


def check_anything(pair: tuple[str, str]) -> str:
    """Checks that only refused references raise, and only ValueError, and that a second verdict is the same."""
    reference, response = pair
    problem = check_answer("math", reference)
    if problem is not None:
        with pytest.raises(ValueError, match="cannot be read"):
            verdict(reference, response)
        return "refused"
    found = verdict(reference, response)
    assert verdict("5", r"\boxed{5}")
    assert verdict(reference, response) == found
    if not any(mark in response for mark in ("\\boxed", "\\fbox", "<answer>", "ans", "#", "is")):
        assert not found or response.strip()
    return "right" if found else "wrong"


# ---- tests

# (cases, check, examples by default, examples in `slow`). math-verify's parser is slow on polynomials.
SUITES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str], int, int]] = {
    "numbers": (number_cases(), check_number, 200, 10_000),
    "polynomials": (polynomial_cases(), check_number, 30, 1_000),
    "anything": (st.tuples(anything, anything), check_anything, 200, 10_000),
}


def run(suite: str, slow: bool) -> Counter[str]:
    cases, check, few, many = SUITES[suite]
    counts: Counter[str] = Counter()

    @drawing(many if slow else few)
    @given(cases)
    def search(case) -> None:
        counts[check(case)] += 1

    search()
    return counts


@pytest.mark.parametrize("suite", SUITES)
def test_generated_answers_get_the_right_verdict(suite: str) -> None:
    assert len(run(suite, slow=False)) >= 2  # some are right and some are wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suite", SUITES)
def test_many_generated_answers_get_the_right_verdict(suite: str) -> None:
    counts = run(suite, slow=True)
    print(suite, dict(counts))
    assert len(counts) >= 2
