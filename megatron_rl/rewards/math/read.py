"""Turns the text of an answer into readings, as values. math-verify parses expressions; nothing is computed here."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import math_verify
import sympy
from math_verify.parser import NormalizationConfig
from sympy import I, Integer, Rational

from megatron_rl.rewards.math.brackets import DEEPEST, balanced, closes_at_end, cut, outside, split, unwrapped
from megatron_rl.rewards.math.notation import spell
from megatron_rl.rewards.math.units import Unit, split_unit
from megatron_rl.rewards.math.values import (
    Chain,
    Equation,
    Inequality,
    Interval,
    Kind,
    Named,
    Quantity,
    Several,
    Special,
    Union,
    Value,
    Word,
)

# math-verify warns that its time limit is off. The limit uses signals, so it works only in a main thread, and it cannot
# end one long call of C, such as a tower of powers. Judges ends the process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = math_verify.LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=False, malformed_operators=False, nits=False, boxed="none")
)

LONGEST_LEAF = 1000
"""Most characters of one expression, number or word."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<digits>{_DECIMAL})"
    r"(?:[eE](?P<e>[-+]?\d{1,3})|\s*\\(?:times|cdot)\s*10\s*\^\s*\{\s*(?P<power>[-+]?\d{1,3})\s*\})?"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[-+]?)\s*10\s*\^\s*\{\s*(?P<power>[-+]?\d{1,3})\s*\}")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\))")
_INTEGER = r"[-+]?\s*\d+"
_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\frac\s*\{{\s*(?P<a>{_INTEGER})\s*\}}\s*\{{\s*(?P<b>{_INTEGER})\s*\}}"
    rf"|\(?\s*(?P<c>{_INTEGER})\s*\)?\s*/\s*\(?\s*(?P<d>{_INTEGER})\s*\)?)"
)
_MIXED = re.compile(
    r"(?<![\w.}^_)])(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\d)\s+(\d+)\s*/\s*(\d+)(?![\w.]))"
)
_IN_BASE = re.compile(r"(\d+)\s*_\s*\{(?:\s*|\\text\s*\{)(\d{1,2})\}?\s*\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|hat)\s*)*(?:m\s*\\angle\s*)?"
    r"(?:[a-zA-Z]+(?:\s+[a-zA-Z]+){0,4}|\\text\s*\{[^{}]*\}|\{[a-zA-Z]+\}"
    r"|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|rho|sigma|omega|ell)|\|[a-zA-Z]+\|)"
    r"\s*(?:_\s*(?:\{[^{}]*\}|\w))?\s*'*(?:\s*\^\s*\{-1\})?\s*(?:\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?"
)
_COMMA = re.compile(",")
_SEPARATORS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("list", re.compile(";")),
    ("or", re.compile(r"\bor\b")),
    ("list", re.compile(r"\band\b")),
    ("list", _COMMA),
)
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_MEMBER = re.compile(r"\\in(?![a-zA-Z])")
_EQUAL = re.compile(r"=|\\approx ")
_RELATIONS = {"<": "<", ">": ">", r"\le ": "<=", r"\ge ": ">=", r"\ne ": "!="}
_RELATION = re.compile(r"<|>|\\le |\\ge |\\ne ")
_CHOICE = re.compile(r"\(?\s*([A-Ha-h])\s*[).:]\s*(.*)")
_SPECIAL: dict[str, Special] = {
    **dict.fromkeys(
        (r"\emptyset", r"\{\}", r"\{ \}", "no solution", "no solutions", "no real solution"), Special("empty")
    ),
    **dict.fromkeys((r"\mathbb{R}", "all real numbers", "all reals", "reals"), Special("reals")),
}
_COUNTED = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
_NUMERALS = _COUNTED.split()
_PREFIX = re.compile(r"\\text\s*\{[^{}]*(?:\bis|\bare|\bbe|:|=)\s*\}\s*(?=\S)")
_COMMANDS = re.compile(r"\\[a-zA-Z]+|\\.")


def read(text: str) -> list[Value]:
    """The readings of an answer, most likely first; [] if it cannot be read."""
    return _read(spell(text), 0)


def read_reference(text: str) -> list[Value]:
    """The readings of a reference, without readings in which 5m is five metres: they would make 5 right."""
    return [value for value in read(text) if not (isinstance(value, Quantity) and value.certainty == "possible")]


def _read(text: str, depth: int) -> list[Value]:
    text = _PREFIX.sub("", unwrapped(text.strip().rstrip(".,;:").strip()), count=1)
    if not text or depth > DEEPEST or not balanced(text):
        return []
    words = _plain_words(text)
    if words in _SPECIAL or text in _SPECIAL:
        return [_SPECIAL.get(text) or _SPECIAL[words]]
    if words in _NUMERALS:
        return [Quantity(Integer(_NUMERALS.index(words)))]
    readings: list[Value] = []
    if _THOUSANDS.fullmatch(text):
        readings += _quantities(re.sub("[, ']", "", text))
    if (match := _DECIMAL_COMMA.fullmatch(text)) and (len(match[2]) != 3 or match[1].lstrip("+-") == "0"):
        readings += _quantities(f"{match[1]}.{match[2]}")
    readings += _structures(text, depth) or _quantities(text) or _words(text)
    if re.fullmatch("[a-h]", words):
        readings.append(Word(words))
    if choice := _CHOICE.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)):
        readings.append(Word(choice[1].lower()))
        readings += _read(choice[2], depth + 1) if choice[2] else []
    return readings


def _structures(text: str, depth: int) -> list[Value]:
    """Readings as lists, unions, relations, or brackets."""
    if not (text.startswith(r"\{") and r"\mid" in text):
        for kind, parts in _lists(text):
            return _several(kind, parts, depth)
    if len(parts := split(text, _UNION)) > 1:
        each = [_read(part, depth + 1) for part in parts]
        return [Union(tuple(_as_region(found) for found in each))] if all(each) else []
    if len(parts := split(text, _MEMBER)) == 2 and _NAME.fullmatch(parts[0].strip()):
        return [Named(_name(parts[0]), _as_region([value])) for value in _read(parts[1], depth + 1)]
    if outside(text, _RELATION):
        return _inequality(text)
    if len(split(text, _EQUAL)) > 1:
        return _equalities(text, depth)
    return _bracketed(text, depth)


def _lists(text: str) -> list[tuple[Kind, list[str]]]:
    for kind, separator in _SEPARATORS:
        parts = split(text, separator)
        if separator is _COMMA and len(parts) > 1 and re.search(r",\s", text):
            parts = split(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text), separator)
        if len(parts) > 1:
            return [(kind, [part for part in parts if part.strip()])]
    return []


def _several(kind: Kind, parts: Sequence[str], depth: int) -> list[Value]:
    each = [_read(part, depth + 1) for part in parts]
    if not each or not all(each):
        return []
    items: list[Value] = []
    for found in each:
        first = found[0]
        if isinstance(first, Several) and first.kind in ("list", "or"):
            items += first.items
        else:
            items.append(first)
    return [items[0]] if len(items) == 1 else [Several(kind, tuple(items))]


def _as_region(readings: Sequence[Value]) -> Value:
    """The reading of "(1, 2)" that is an interval; if there is none, the first reading."""
    return next((value for value in readings if isinstance(value, Interval)), readings[0])


def _bracketed(text: str, depth: int) -> list[Value]:
    if text.startswith(r"\{") and text.endswith(r"\}") and closes_at_end(text):
        inner = text[2:-2].strip()
        builder = re.split(r"\\mid|\\vert|(?<=[a-zA-Z])\s*[|:]", inner, maxsplit=1)
        if len(builder) == 2 and (name := builder[0].split(r"\in")[0].strip()) and _NAME.fullmatch(name):
            return [Named(_name(name), value) for value in _read(builder[1], depth + 1)]
        found = _several("set", [part for _, parts in _lists(inner) for part in parts] or [inner], depth)
        return [
            value if isinstance(value, Several) and value.kind == "set" else Several("set", (value,)) for value in found
        ]
    text = re.sub(r"^\\langle\s*(.*?)\s*\\rangle$", r"(\1)", text)
    if not (text[0] in "([" and text[-1] in ")]" and closes_at_end(text)):
        return []
    inner = text[1:-1]
    parts = next((parts for kind, parts in _lists(inner) if kind == "list"), [inner])
    each = [_read(part, depth + 1) for part in parts]
    if not all(each):
        return []
    if len(each) == 1:
        return each[0] if text[0] == "(" and text[-1] == ")" else []
    readings: list[Value] = []
    items = tuple(found[0] for found in each)
    if len(items) == 2 and isinstance(items[0], Quantity) and isinstance(items[1], Quantity):
        readings.append(Interval(items[0], items[1], text[0] == "(", text[-1] == ")"))
    if text[0] + text[-1] in ("()", "[]"):
        readings.insert(0, Several("tuple" if text[0] == "(" else "row", items))
    return readings


def _inequality(text: str) -> list[Value]:
    pieces, relations = cut(text, _RELATION)
    parts = _one_each(pieces)
    return [Inequality(parts, tuple(_RELATIONS[relation] for relation in relations))] if parts else []


def _equalities(text: str, depth: int) -> list[Value]:
    parts = [part.strip() for part in split(text, _EQUAL)]
    if not all(parts):
        return []
    if _NAME.fullmatch(parts[-1]) and not _NAME.fullmatch(parts[0]):
        parts = [parts[-1], *parts[:-1]]
    names = 0
    while names < len(parts) - 1 and _NAME.fullmatch(parts[names]):
        names += 1
    rest = parts[names:]
    if len(rest) == 1:
        return [Named(_name(parts[0]), value) for value in _read(rest[0], depth + 1)]
    chain = Chain(_one_each(rest))
    if not chain.parts:
        return []
    if names:
        return [Named(_name(parts[0]), chain)]
    readings: list[Value] = [chain]
    if len(chain.parts) == 2:
        readings.append(Equation(*chain.parts))
    return readings


def _name(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s{}\\]", "", text)


# ---- quantities and words


def _quantities(text: str) -> list[Value]:
    """Readings as a number or an expression, with its unit if it has one."""
    text = unwrapped(text.strip())
    if not text or len(text) > LONGEST_LEAF:
        return []
    if number := _number(text):
        return [number]
    readings: list[Value] = []
    for value, unit, certainty in split_unit(text):
        found = _quantities(value)
        readings += [replace(q, unit=unit, certainty=certainty) for q in found if isinstance(q, Quantity)]
        if certainty == "sure":
            return readings
    if "\\pm" in text or "\\mp" in text:
        signs = [text.replace("\\pm", a).replace("\\mp", b) for a, b in (("+", "-"), ("-", "+"))]
        both = [_quantities(part.lstrip("+ ")) for part in signs]
        return [Several("list", tuple(found[0] for found in both))] if all(both) else []
    if expression := _expression(text):
        readings.insert(0, expression)
    return readings


def _one_each(texts: Sequence[str]) -> tuple[Quantity, ...]:
    """The first reading of each text; () if one of them is not a quantity."""
    found = [next(iter(_quantities(text)), None) for text in texts]
    quantities = tuple(one for one in found if isinstance(one, Quantity))
    return quantities if len(quantities) == len(texts) else ()


def _number(text: str) -> Quantity | None:
    """The exact value of a written number."""
    plain = re.sub("[ ,']", "", text) if _THOUSANDS.fullmatch(text) else text
    if match := _NUMBER.fullmatch(plain):
        return _decimal(match["sign"], match["digits"], int(match["e"] or match["power"] or 0))
    if match := _POWER_OF_TEN.fullmatch(text):
        return _decimal(match["sign"], "1", int(match["power"]))
    if match := _REPEATING.fullmatch(text):
        whole, once, again = match[2] or "0", match[3], match[4] or match[5]
        ones = Rational(int(again), 10 ** len(once) * (10 ** len(again) - 1))
        value = Rational(int(whole + once), 10 ** len(once)) + ones
        return Quantity(-value if match[1] else value)
    if match := _FRACTION.fullmatch(text):
        top, bottom = (int(re.sub(r"\s", "", match[a] or match[b])) for a, b in (("a", "c"), ("b", "d")))
        return Quantity(Rational(-top if match["sign"] == "-" else top, bottom)) if bottom else None
    if (match := _IN_BASE.fullmatch(text)) and 2 <= int(match[2]) <= 10 and int(max(match[1])) < int(match[2]):
        return Quantity(Integer(match[1]), unit=Unit(((f"base {match[2]}", 1),)))
    sign = "-" if text.startswith("-") else ""
    if (match := _MIXED.fullmatch(text.lstrip("-+ "))) and (value := _mixed(match)) is not None:
        return Quantity(-value if sign else value)
    return None


def _decimal(sign: str, digits: str, exponent: int) -> Quantity:
    whole, _, after = digits.partition(".")
    last_place = exponent - len(after)
    value = Rational(int((whole + after) or "0")) * Rational(10) ** last_place
    written = len((whole + after).lstrip("0"))
    exact = not after and exponent >= 0 and written < 2
    return Quantity(
        -value if sign == "-" else value, True, None if exact or not (after or exponent) else last_place, written
    )


def _mixed(match: re.Match[str]) -> Rational | None:
    whole, top, bottom = (int(group) for group in match.groups() if group)
    return whole + Rational(top, bottom) if top < bottom else None


def _expression(text: str) -> Quantity | None:
    """The expression that math-verify's parser returns, with exact numbers instead of floating point."""
    text = re.sub(r"\\text\s*\{\s*(\w)\s*\}", r" \1 ", text)
    if "\\text" in text or (":" in text and not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*", text)):
        return None
    if re.search(r"\d\s+\d|[?#&\"]|\.\.|[^\x00-\x7f]", text) and "matrix" not in text:
        return None
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}", _COMMANDS.sub(" ", text)) or _is_bomb(text):
        return None
    latex = _MIXED.sub(_mixed_as_sum, text)
    latex = re.sub(rf"(?<![\w.]){_DECIMAL}(?![\w.])", _as_fraction, latex)
    # The parser adds a number to the term after it if there is no sign between them.
    latex = re.sub(r"(?<![_\w])(\d+)\s*(?=\(|\\frac|\{\\frac)", r"\1 \\cdot ", latex)
    latex = re.sub(r"(?<=[)}])\s*(?=\d)", r" \\cdot ", latex) if re.search(r"\)\s*\d", latex) else latex
    try:
        found = math_verify.parse(
            f"${latex}$", extraction_config=[_LATEX], fallback_mode="no_fallback", parsing_timeout=None
        )
    except (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError):
        return None
    if len(found) != 1 or not isinstance(found[0], sympy.Expr | sympy.MatrixBase):
        return None
    value = _with_constants(found[0])
    if isinstance(value, sympy.Expr) and value.has(sympy.nan, sympy.zoo):
        return None
    return Quantity(value, finished="\\div" not in text and _is_finished(value))


def _is_bomb(text: str) -> bool:
    """Whether the parser itself would compute for ever. Other large numbers are never computed (compare.py)."""
    binomial = re.search(r"\\binom|\\choose|C\s*\(", text)
    return bool(re.search(r"\d{1000}", text)) or bool(binomial and re.search(r"\d{5}|\^|!", text))


def _mixed_as_sum(match: re.Match[str]) -> str:
    value = _mixed(match)
    return match[0] if value is None else rf"(\frac{{{value.p}}}{{{value.q}}})"


def _as_fraction(match: re.Match[str]) -> str:
    if "." not in match[0]:
        return match[0]
    value = _decimal("", match[0], 0).value
    assert isinstance(value, Rational)
    return rf"\frac{{{value.p}}}{{{value.q}}}"


def _with_constants(value: sympy.Basic) -> sympy.Basic:
    """Replaces i, and e in \\text, by the constants. The parser takes them for variables."""
    constants = {symbol: I if symbol.name == "i" else sympy.E for symbol in value.free_symbols if symbol.name in "ie"}
    return value.xreplace(constants) if constants else value


def _is_finished(value: sympy.Basic) -> bool:
    """Whether nothing is left to compute. A power, a factorial, and a fraction of these count as finished."""
    if value.free_symbols or isinstance(value, sympy.MatrixBase):
        return True
    if isinstance(value, sympy.Number):
        return True
    if isinstance(value, sympy.Pow):
        return value.base.is_Integer and (value.exp.is_Integer or _is_finished_integer_power(value.exp))
    if isinstance(value, sympy.factorial):
        return value.args[0].is_Integer
    if isinstance(value, sympy.Mul):
        tops = [arg for arg in value.args if not (isinstance(arg, sympy.Pow) and arg.exp == -1) and arg != -1]
        return len(tops) <= 1 and all(map(_is_finished, tops))
    return False


def _is_finished_integer_power(value: sympy.Basic) -> bool:
    return isinstance(value, sympy.Pow) and value.base.is_Integer and value.exp.is_Integer


def _words(text: str) -> list[Value]:
    """Reading as a word, which is compared as text. Text with digits and no LaTeX, such as "3:30 pm", is a word too."""
    words = _plain_words(text)
    if not words or len(words) > LONGEST_LEAF or "\\" in words or not re.search(r"\w", words):
        return []
    return [Word(words)]


def _plain_words(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"^\((\s*\w\s*)\)$", r"\1", text.strip())
    return re.sub(r"\s+", " ", text).strip(" .,;:!'").lower()
