"""Text with brackets: what stands outside of them, and where they close."""

from __future__ import annotations

import re

DEEPEST = 12
"""Brackets within each other. The time that math-verify's parser takes may grow with their power."""


def unwrapped(text: str) -> str:
    """Without the braces of LaTeX around all of it."""
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and closes_at_end(text):
        text = text[1:-1].strip()
    return text


def depths_of(text: str) -> list[int]:
    """Of brackets of any kind, before each character. A half-open interval's differ, so kinds are not told apart."""
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
    """Whether every bracket is closed, and not too many are within each other."""
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
