"""Finds where brackets close and which text is outside of them."""

from __future__ import annotations

import re

DEEPEST = 12
"""Deepest nesting of brackets. The time of math-verify's parser may grow exponentially with it."""


def unwrapped(text: str) -> str:
    """The text without LaTeX braces around the whole of it."""
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and closes_at_end(text):
        text = text[1:-1].strip()
    return text


def depths_of(text: str) -> list[int]:
    """Depth of brackets before each character. All kinds count alike: the two ends of a half-open interval differ."""
    depths = []
    depth = 0
    for character in text:
        depths.append(depth)
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
    depths.append(depth)
    return depths


def balanced(text: str) -> bool:
    """Whether every bracket is closed and the nesting is not too deep."""
    depths = depths_of(text)
    return depths[-1] == 0 and min(depths) == 0 and max(depths) <= DEEPEST


def closes_at_end(text: str) -> bool:
    depths = depths_of(text)
    first = 1 if text[0] == "\\" else 0
    return all(depth > 0 for depth in depths[first + 1 : -1]) and depths[-1] == 0


def cut(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The pieces between matches outside of brackets, and the matches."""
    depths = depths_of(text)
    pieces, matches = [], []
    start = 0
    for match in pattern.finditer(text):
        if depths[match.start()] == 0:
            pieces.append(text[start : match.start()])
            matches.append(match[0])
            start = match.end()
    return [*pieces, text[start:]], matches


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    return cut(text, separator)[0]


def outside(text: str, pattern: re.Pattern[str]) -> bool:
    return bool(cut(text, pattern)[1])
