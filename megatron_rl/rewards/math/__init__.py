"""The verifier of mathematical answers, on math-verify's LaTeX parser. docs/verifiers.md says what it accepts.

extract.py finds the final answer in a response, notation.py normalizes its spelling, units.py splits off its unit,
read.py turns it into values, and compare.py compares values. Only read.py uses sympy's parser. No text is evaluated as
code.
"""

from __future__ import annotations

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.math.compare import right
from megatron_rl.rewards.math.extract import final_answer
from megatron_rl.rewards.math.read import read, read_reference

EXPECTED = "expected a number, expression, equation, interval, set, tuple or a word or two, in LaTeX or as plain text"


def verify_math(prompt: Prompt, response: str) -> Verdict:
    """Judges the final answer in `response`: reward 1 if it equals `prompt.answer`, else 0.

    There is no time limit here: megatron_rl.rewards.judges ends a comparison that takes too long. Raises ValueError if
    the reference cannot be read.
    """
    reference = _read_reference(prompt.answer)
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer!r} cannot be read; {EXPECTED}")
    answer = final_answer(response)
    correct = answer is not None and right(reference, read(answer))
    return Verdict(float(correct), correct)


def check_math_answer(answer: str) -> str | None:
    """None if `verify_math` can read the reference answer, else the reason."""
    return None if _read_reference(answer) else f"{answer[:100]!r} cannot be read; {EXPECTED}"


verify_math.check_answer = check_math_answer  # type: ignore[attr-defined]


def _read_reference(answer: str) -> list:
    """Reads a reference, which is an answer or a solution that ends in one box."""
    boxed = final_answer(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    return read_reference(boxed) if boxed else []
