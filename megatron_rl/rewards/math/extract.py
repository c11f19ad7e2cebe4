r"""Finds the final answer of a response, as text.

The answer is the content of the last \boxed or <answer>; else the text after the last "answer is", "answer:" or "####";
else an expression that ends the response. Text in <think> and text that is crossed out is not an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 4000
"""Most characters of an answer. A longer text does not count as one."""

_CROSSED_OUT = re.compile(r"~~.*?~~|<(?P<tag>s|del|strike)>.*?</(?P=tag)>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_CROSSING = re.compile(r"\\(?:cancel|bcancel|xcancel|sout|st)\s*(?=\{)")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_JOINER = re.compile(
    r"[\s$,;.&]*(?:\\(?:quad|qquad|text|mathrm)\b\s*)*\{?\s*(?:,|;|and|or|\s)\s*\}?(?:\\text\s*)?[\s$,;&]*(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?[\s$]*"
)
_MARKER = re.compile(
    r"####|(?:final\s+)?(?:answer|result)\b[*_`\s]*(?:(?:is|are|equals)\b(?!\s+not\b|n't)|[:=])[*_`]*\s*[:=]?[*_`]*",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.!?](?=\s|$)|\n")
_NUMBER = re.compile(r"[-+−]?[$€£]?\s*[\d.,/^*()+\-−√πx×\s]*\d[\d)]*%?")
_AFTER_LEADING = re.compile(r"\s*(?:[,;(]|because\b|since\b|as\b|which\b|where\b|$)")
_HEDGE = re.compile(r"(?:\bor|\bnot|\beither|\bnor|n't)\s*\$?$", re.IGNORECASE)
_TRAILING_WORDS = 2
_LEFT = re.compile(r"\s+(?:(?:are|is|were|was)\s+)?(?:left|remaining|remain|altogether|total|in total|in all)$")
# A response that is only an answer: at most three words, or an expression from its first character on.
_ALONE = re.compile(r"(?=\S+(?:\s+\S+){0,2}\s*$)(?:[^\d$]*$|[-+−(\[{\\$€£\d.√π]|\w\s*[=<>])")


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    text: str


def final_answer(response: str) -> str | None:
    """The answer; None if there is no box, tag or marker and the response does not end with an expression."""
    text = _without_crossed_out(_after_thinking(response))
    found: str | None = None
    boxes, tags = _boxes(text), [_Span(m.start(), m.end(), m[1]) for m in _TAG.finditer(text)]
    if tags and (not boxes or tags[-1].end > boxes[-1].end):
        boxes, found = _boxes(tags[-1].text), tags[-1].text
        text = tags[-1].text
    elif not boxes and not _BOX.search(text):
        found = _conclusion(text)
    if boxes:
        found = _joined(text, boxes)
    elif _BOX.search(text):
        return None  # the box is never closed
    return found if found and found.strip() and len(found) <= LONGEST else None


def _after_thinking(response: str) -> str:
    thoughts, _, answer = response.rpartition("</think>")
    return answer if answer.strip() else thoughts


def _without_crossed_out(text: str) -> str:
    text = _CROSSED_OUT.sub(" ", text)
    closings = _closings(text)
    kept, position = [], 0
    for match in _CROSSING.finditer(text):
        if match.start() >= position:
            kept.append(text[position : match.start()])
            position = closings.get(match.end(), len(text)) + 1  # to the end if it is never closed
    return " ".join([*kept, text[position:]])


def _boxes(text: str) -> list[_Span]:
    """The outermost boxes that are closed, in order."""
    found = []
    position = 0
    closings = _closings(text)
    while match := _BOX.search(text, position):
        start = match.end()
        if start < len(text) and text[start] == "{":
            end = closings.get(start)
            if end is None:
                position = start
                continue
            found.append(_Span(match.start(), end + 1, unboxed(text[start + 1 : end])))
            position = end + 1
        else:  # \boxed5 or \boxed 5
            bare = re.compile(r"[^\s$.,;{}\\]+").match(text, start)
            position = bare.end() if bare else start
            if bare:
                found.append(_Span(match.start(), position, bare[0]))
    return found


def unboxed(text: str) -> str:
    """The text with each box in it replaced by its content."""
    return _BOX.sub("", text)


def _closings(text: str) -> dict[int, int]:
    """Positions at which each closed brace opens and closes. Escaped braces are text."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closings[opened.pop()] = match.start()
    return closings


def _joined(text: str, boxes: list[_Span]) -> str:
    """The last box that is not empty, joined with boxes before it if only commas, "and" or "or" are between."""
    filled = [box for box in boxes if box.text.strip()]
    if not filled:
        return ""
    answer = [filled[-1].text]
    for before, after in zip(filled[-2::-1], filled[:0:-1], strict=True):
        if not _JOINER.fullmatch(text[before.end : after.start]):
            break
        answer.insert(0, before.text)
    return answer[0] if len(set(answer)) == 1 else " ; ".join(answer)


def _conclusion(text: str) -> str | None:
    """The answer of a response without a box."""
    marked = _last_marked(text)
    if marked is not None:
        return marked
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if len(lines) == 1 and (_MATH.fullmatch(lines[0]) or _ALONE.match(lines[0])):
        return lines[0]
    last = _SENTENCE_END.split(lines[-1].rstrip(" .!*_`"))[-1].strip()
    return None if lines[-1].endswith("?") else _ending_expression(last)


def _last_marked(text: str) -> str | None:
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :].lstrip(" \n\t}")  # the marker may stand in \text{}
    if (math := _MATH.match(rest)) and re.match(r"\s*(?:[.,;:]?\s*$|\.\s)", rest[math.end() :]):
        return _content(math)
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0].strip(" *_`")
    leading = _MATH.match(sentence) or _NUMBER.match(sentence)
    if leading and _AFTER_LEADING.match(sentence, leading.end()) and not re.search(r"\b(?:or|and)\b", sentence):
        tail = sentence[leading.end() :]
        if re.match(r"\s*[,;]\s*[-\d$\\]", tail):
            return sentence  # a list
        return _content(leading)
    return sentence or None


def _ending_expression(sentence: str) -> str | None:
    """An expression that ends the sentence, or that only its unit follows."""
    spans = list(_MATH.finditer(sentence))
    if spans and _is_end(sentence, spans[-1]):
        return _content(spans[-1])
    if spans:
        return None
    sentence = re.split(r"(?<![<>!])=", sentence)[-1].strip() if "=" in sentence else sentence
    fraction = re.search(r"-?\\[a-zA-Z]+[^a-zA-Z\s].*$", sentence)
    if fraction:
        return None if _HEDGE.search(sentence[: fraction.start()]) else fraction[0]
    numbers = [match for match in _NUMBER.finditer(sentence) if match[0].strip()]
    if not numbers or not _is_end(sentence, numbers[-1]):
        return None
    return _LEFT.sub("", sentence[numbers[-1].start() :]).strip()


def _is_end(sentence: str, match: re.Match[str]) -> bool:
    words = sentence[match.end() :].split()
    hedged = _HEDGE.search(sentence[: match.start()].rstrip() + " ")
    return len(words) <= _TRAILING_WORDS and not hedged


def _content(match: re.Match[str]) -> str:
    return next((group for group in match.groups() if group is not None), match[0])
