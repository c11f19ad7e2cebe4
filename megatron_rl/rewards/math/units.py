"""Units after a number. Known units are converted; other words, as in "18 apples", are not judged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import sympy
from sympy import Rational

_MOST_WORDS = 3
_ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Unit:
    """`factor` is the size in base units; `powers` are of base dimensions, such as (("length", 2),)."""

    dimension: tuple[tuple[str, int], ...]
    factor: sympy.Expr = _ONE

    @property
    def is_ratio(self) -> bool:
        """Whether the unit is percent or degrees, which are numbers too: 50% is 0.5."""
        return self.dimension in ((("ratio", 1),), (("angle", 1),))


PERCENT = Unit((("ratio", 1),), Rational(1, 100))
DEGREE = Unit((("angle", 1),), sympy.pi / 180)

_TABLE: dict[str, list[tuple[str, sympy.Expr]]] = {
    "ratio": [("percent percentage pct", Rational(1, 100))],
    "angle": [("degree degrees deg", sympy.pi / 180), ("radian radians rad", sympy.Integer(1))],
    "length": [
        ("m meter meters metre metres", Rational(1)),
        ("mm millimeter millimeters millimetre millimetres", Rational(1, 1000)),
        ("cm centimeter centimeters centimetre centimetres", Rational(1, 100)),
        ("dm decimeter decimeters", Rational(1, 10)),
        ("km kilometer kilometers kilometre kilometres", Rational(1000)),
        ("in inch inches", Rational(254, 10000)),
        ("ft foot feet", Rational(3048, 10000)),
        ("yd yard yards", Rational(9144, 10000)),
        ("mi mile miles", Rational(1609344, 1000)),
    ],
    "mass": [
        ("g gram grams", Rational(1)),
        ("mg milligram milligrams", Rational(1, 1000)),
        ("kg kilogram kilograms kilo kilos", Rational(1000)),
        ("lb lbs pound pounds", Rational(45359237, 100000)),
        ("oz ounce ounces", Rational(45359237, 1600000)),
        ("ton tons tonne tonnes", Rational(1000000)),
    ],
    "time": [
        ("s sec secs second seconds", Rational(1)),
        ("min mins minute minutes", Rational(60)),
        ("h hr hrs hour hours", Rational(3600)),
        ("day days", Rational(86400)),
        ("week weeks", Rational(604800)),
    ],
    "month": [("month months", Rational(1)), ("yr yrs year years", Rational(12))],
    "volume": [
        ("l L liter liters litre litres", Rational(1)),
        ("ml mL milliliter milliliters millilitre millilitres", Rational(1, 1000)),
        ("gal gallon gallons", Rational(3785411784, 1000000000)),
    ],
    "money": [("$ dollar dollars usd buck bucks", Rational(1)), ("¢ cent cents", Rational(1, 100))],
    "euro": [("€ euro euros eur", Rational(1))],
    "pound sterling": [("£ gbp", Rational(1))],
    "yen": [("¥ yen yuan rmb", Rational(1))],
    "rupee": [("₹ rs rupee rupees", Rational(1))],
    "celsius": [("°C celsius", Rational(1))],
    "fahrenheit": [("°F fahrenheit", Rational(1))],
}
_UNITS = {
    name: (dimension, factor) for dimension, rows in _TABLE.items() for names, factor in rows for name in names.split()
}
_SPELT = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour", "sqft": "square ft", "cc": "cubic cm"}
CURRENCY = "$€£¥₹"

# Words that make the text a sentence: "5 is wrong" is not 5 of something.
_SENTENCE = """
    not no is isn are be was if else or and but nor maybe perhaps wrong false incorrect right wait then than so to mod
    modulo plus minus times divided over choose since because where when either actually instead except about more less
    least most greater fewer factorial squared cubed dozen hundred thousand million billion half
"""
_NOT_UNITS = frozenset(_SENTENCE.split())
_WORD = r"(?:\\text\s*\{[^{}]*\}|(?<!\\)(?<![a-zA-Z])[a-zA-Z][a-zA-Z.]*)"
_PHRASE = re.compile(
    rf"(?P<value>.*?[\d}})\]!])(?P<gap>\s*)(?P<phrase>{_WORD}(?:\s*\^\s*\{{-?\d\}})?"
    rf"(?:\s*/\s*|\s*\\cdot\s*|\s+|(?=\\text))?(?:{_WORD}(?:\s*\^\s*\{{-?\d\}})?(?:\s*/\s*|\s+|(?=\\text))?)*)"
)
_DEGREES = re.compile(r"(?P<value>.*\S)\s*\^\{\\circ\}\s*(?:\\text\s*\{\s*)?(?P<scale>[CF])?\s*\}?")
_PART = re.compile(
    r"(?:(?P<before>square|sq\.?|cubic|cu\.?)\s+)?(?P<name>[a-zA-Z$€£¥₹¢°]+)\.?"
    r"\s*(?:\^\s*\{(?P<power>-?\d)\}|(?P<after>squared|cubed))?"
)
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}


Certainty = Literal["sure", "likely", "possible"]
"""Certainty of a unit: 5 \\text{m}; 5 m; and 5m, which may also be five times the variable m."""


def split_unit(text: str) -> Iterator[tuple[str, Unit | None, Certainty]]:
    """The ways to split a unit off the spelt `text`: value, unit, certainty. For unknown words the unit is None."""
    sign = "-" if text.startswith("-") else ""
    body = text[len(sign) :].lstrip()
    if body[:1] and body[0] in CURRENCY:
        yield sign + body[1:].strip(), parse_unit(body[0]), "sure"
        return
    if text[-1:] in ("%", *CURRENCY, "¢"):
        yield text[:-1].strip(), PERCENT if text[-1] == "%" else parse_unit(text[-1]), "sure"
        return
    if match := _DEGREES.fullmatch(text):
        scale = match["scale"]
        yield match["value"], parse_unit("°" + scale) if scale else DEGREE, "sure"
        return
    if not (match := _PHRASE.fullmatch(text)):
        return
    phrase = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", match["phrase"]).strip(" .()")
    phrase = re.sub(r"\s+", " ", phrase)
    unit = parse_unit(phrase)
    if unit is not None:
        sure = "\\text" in match["phrase"] or len(phrase) > 2
        yield match["value"], unit, "sure" if sure else "likely" if match["gap"] else "possible"
    elif _are_words(phrase):
        yield match["value"], None, "sure"


def parse_unit(phrase: str) -> Unit | None:
    """The unit of the text; None if a part of it is not a known unit."""
    dimension: dict[str, int] = {}
    factor: sympy.Expr = _ONE
    phrase = _SPELT.get(phrase.lower(), phrase)
    for number, part in enumerate(re.split(r"\s*/\s*|\s+per\s+", phrase)):
        match = _PART.fullmatch(part.strip())
        found = match and (_UNITS.get(match["name"]) or _UNITS.get(match["name"].lower()))
        if not match or not found:
            return None
        power = int(match["power"] or 0) or _POWERS.get(match["before"] or match["after"] or "", 1)
        power = -power if number else power
        name, size = found
        if name == "volume":  # a litre is a cubic decimetre
            name, size, power = "length", (size / 1000) ** Rational(1, 3), 3 * power
        dimension[name] = dimension.get(name, 0) + power
        factor *= size**power
    return Unit(tuple(sorted((name, power) for name, power in dimension.items() if power)), factor)


def _are_words(phrase: str) -> bool:
    words = phrase.split()
    if not 0 < len(words) <= _MOST_WORDS:
        return False
    return all(
        word in ("of", "in", "per", "a", "an", "the")
        or (len(word) >= 3 and word.isalpha() and word.lower() not in _NOT_UNITS)
        or parse_unit(word) is not None
        for word in words
    )
