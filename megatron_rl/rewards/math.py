"""Mathematical answers, compared by math-verify."""

from __future__ import annotations

import logging
import re
from decimal import Decimal

import math_verify

from megatron_rl.data.sample import Prompt, Verdict

# It warns that its time limit is off. The limit works by signals, so only in a main thread, and not in one long call of
# C, such as a tower of powers; Judges ends the process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


_PLAIN = re.compile(r"-?\d{1,1000}(\.\d{1,1000})?")
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}")


def verify_math(prompt: Prompt, response: str) -> Verdict:
    """Right when the last answer in the response, or the boxed one, equals the reference as an expression.

    Has no time limit of its own. Raises ValueError for a reference that is not mathematics.
    """
    reference = math_verify.parse(_as_latex(prompt.answer), parsing_timeout=None)
    if not reference:
        raise ValueError(f"the reference answer {_problem(prompt.answer)}")
    answer = math_verify.parse(response, parsing_timeout=None)
    correct = bool(math_verify.verify(reference, answer, timeout_seconds=None))
    return Verdict(float(correct), correct)


def check_math_answer(answer: str) -> str | None:
    """None, or why `verify_math` cannot read the reference answer. Has no time limit of its own."""
    if _PLAIN.fullmatch(answer) or math_verify.parse(_as_latex(answer), parsing_timeout=None):
        return None
    return _problem(answer)


verify_math.check_answer = check_math_answer  # type: ignore[attr-defined]


def _problem(answer: str) -> str:
    return f"{answer[:100]!r} is not a mathematical expression"


def _as_latex(answer: str) -> str:
    """math-verify takes bare LaTeX for prose, and the e of 6.02e23 for Euler's number; a reference is an expression."""
    if _SCIENTIFIC.fullmatch(answer.strip()):
        answer = format(Decimal(answer.strip()), "f")
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
