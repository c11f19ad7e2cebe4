"""Mathematical answers, compared by math-verify."""

from __future__ import annotations

import logging

import math_verify

from megatron_rl.data.sample import Prompt, Verdict

# It warns that its time limit is off. The limit works by signals, so only in a main thread, and not in one long call of
# C, such as a tower of powers; Judges ends the process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify_math(prompt: Prompt, response: str) -> Verdict:
    """Right when the last answer in the response, or the boxed one, equals the reference as an expression.

    Has no time limit of its own. Raises ValueError for a reference that is not mathematics.
    """
    reference = math_verify.parse(_as_latex(prompt.answer), parsing_timeout=None)
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer!r} is not a mathematical expression")
    answer = math_verify.parse(response, parsing_timeout=None)
    correct = bool(math_verify.verify(reference, answer, timeout_seconds=None))
    return Verdict(float(correct), correct)


def _as_latex(answer: str) -> str:
    """math-verify takes bare LaTeX for prose; a reference is an expression."""
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
