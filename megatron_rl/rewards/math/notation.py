r"""Gives one spelling to the many ways of writing the same mathematics: Unicode, LaTeX's synonyms, and plain text.

`spell` returns LaTeX without meaningless delimiters, sizes and spaces: "½" and "\dfrac12" become \frac{1}{2}.
"""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    **dict.fromkeys("−–—﹣－‐‑‒", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061\u2062\u2063", ""),
    **dict.fromkeys("≤⩽", r"\le "),
    **dict.fromkeys("≥⩾", r"\ge "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("‘’ʹ′", "'"),
    "÷": r"\div ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "ℝ": r"\mathbb{R}",
    "±": r"\pm ",
    "∓": r"\mp ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∜": r"\sqrt[4] ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "％": "%",
    "℃": r"^{\circ}\text{C}",
    "℉": r"^{\circ}\text{F}",
}
_GREEK = {
    chr(code): "\\" + unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda") + " "
    for code in range(0x3B1, 0x3CA)
    if code != 0x3C2
}
_SUPERSCRIPTS = {unicodedata.normalize("NFKC", c): c for c in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ"}
_SUBSCRIPTS = {unicodedata.normalize("NFKC", c): c for c in "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₒₓₙ"}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS.values())}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS.values())}]+")
_MINUS = str.maketrans("−", "-")

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp"
_ATOM = r"(?:\{[^{}]*\}|\d|[a-zA-Z](?![a-zA-Z])|\\[a-zA-Z]+)"

# In order; each is (pattern, replacement).
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", "$"),
        (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|Biggl?|Biggr?|middle)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|boldsymbol|bm)(?![a-zA-Z])", ""),
        (r"\\(?:hspace|vspace|phantom|hphantom|label|tag|color)\*?\s*\{[^{}]*\}", ""),
        (r"\\textcolor\s*\{[^{}]*\}", ""),
        (r"\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)~", " "),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:d|t)binom(?![a-zA-Z])", r"\\binom"),
        (
            r"\\(?:math(?:rm|bf|it|sf|tt|normal)|text(?:bf|it|rm|sf|tt|normal)|mbox|operatorname\*?|rm|bf)\s*(?=\{)",
            r"\\text",
        ),
        (r"\{\s*\\(?:rm|bf)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:underline|mathbb)\s*\{([^{}R]*)\}", r"\1"),
        (r"\\mathbb\s*R(?![a-zA-Z])|\\R(?![a-zA-Z])|\\Re(?:als)?(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|\\not\s*=|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"\\(?:simeq|thickapprox|doteq)(?![a-zA-Z])", r"\\approx "),
        (r"\\(?:infin|infty)(?![a-zA-Z])|(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\\text\s*\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\lor(?![a-zA-Z])|\\vee(?![a-zA-Z])", " or "),
        (r"\\land(?![a-zA-Z])|\\wedge(?![a-zA-Z])", " and "),
        (r"\\text\s*\{\s*\}", ""),
        (r"\\(?:arc|cos|sin)?degree(?![a-zA-Z])|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}", r"^{\\circ}"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"(?<![\\a-zA-Z])sqrt\s*(?=[({])", r"\\sqrt"),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?=\s*[(\d\\]|\s+[a-z](?![a-zA-Z]))", r"\\\1"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"\^\s*(-?\d+)", r"^{\1}"),
        (r"_\s*(\w)", r"_{\1}"),
        (rf"\\frac\s*({_ATOM})\s*({_ATOM})", lambda m: rf"\frac{_braced(m[1])}{_braced(m[2])}"),
        (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d+(?:\.\d+)?|[a-zA-Z]|\\pi)", r"\\sqrt\1{\2}"),
    )
]


def spell(text: str) -> str:
    """The text in the one spelling. Spelling the result again does not change it."""
    text = "".join(map(_character, _vulgar(text)))
    text = _RAISED.sub(lambda m: "^{" + _plain(m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + _plain(m[0]) + "}", text)
    text = re.sub(r"\s+", " ", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _parenthesised(_parenthesised(text, r"\^\s*"), r"\\sqrt(?:\[[^\[\]]*\])?\s*")
    return _trimmed(text)


def _braced(text: str) -> str:
    return text if text.startswith("{") else "{" + text + "}"


def _vulgar(text: str) -> str:
    r"""Writes fractions of one character, such as ½, as \frac."""

    def fraction(character: str) -> str:
        top, slash, bottom = unicodedata.normalize("NFKC", character).partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}" if slash and bottom else character

    return "".join(fraction(c) if unicodedata.category(c) == "No" else c for c in text)


def _character(character: str) -> str:
    if character < "\x80":
        return character
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if character in _GREEK:
        return _GREEK[character]
    if character in _SUPERSCRIPTS.values() or character in _SUBSCRIPTS.values():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if character.isspace():
        return " "
    return unicodedata.normalize("NFKC", character)


def _plain(raised: str) -> str:
    return unicodedata.normalize("NFKC", raised).translate(_MINUS)


def _parenthesised(text: str, before: str) -> str:
    """Replaces the parentheses after `before` by braces."""
    for match in reversed(list(re.finditer(before + r"(?=\()", text))):
        end = _matching(text, match.end())
        if end is not None:
            text = text[: match.end()] + "{" + text[match.end() + 1 : end] + "}" + text[end + 1 :]
    return text


def _matching(text: str, start: int) -> int | None:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return None


def _trimmed(text: str) -> str:
    """The answer without the marks around it: LaTeX's dollars, Markdown's emphasis, and the full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("`_").rstrip(".,;:").strip()
        if text.startswith("$") and text.endswith("$") and len(text) > 1:
            text = text.strip("$")
        if text.endswith("$"):
            text = text.rstrip("$")
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]
    return text
