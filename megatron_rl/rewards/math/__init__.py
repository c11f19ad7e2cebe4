"""The verifier of mathematical answers, on math-verify's LaTeX parser. docs/verifiers.md says what it accepts.

extract.py finds the final answer in a response, notation.py spells it one way, units.py takes its unit off, read.py
makes values of it, and compare.py compares values. Only read.py uses sympy's parser, and no text is evaluated as code.
"""

from __future__ import annotations

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.math.compare import right
from megatron_rl.rewards.math.extract import final_answer
from megatron_rl.rewards.math.read import read, read_reference

EXPECTED = "expected a number, expression, equation, interval, set, tuple or a word or two, in LaTeX or as plain text"


def verify_math(prompt: Prompt, response: str) -> Verdict:
    """Verdict of the final answer in `response`: reward 1 if it is what `prompt.answer` says, else 0.

    It has no time limit of its own: megatron_rl.rewards.judges ends a comparison that takes too long. Raises ValueError
    for a reference that cannot be read.
    """
    reference = _read_reference(prompt.answer)
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer!r} cannot be read; {EXPECTED}")
    answer = final_answer(response)
    correct = answer is not None and right(reference, read(answer))
    return Verdict(float(correct), correct)


def check_math_answer(answer: str) -> str | None:
    """None, or why `verify_math` cannot read the reference answer."""
    return None if _read_reference(answer) else f"{answer[:100]!r} cannot be read; {EXPECTED}"


verify_math.check_answer = check_math_answer  # type: ignore[attr-defined]


def _read_reference(answer: str) -> list:
    """A reference is an answer, or a solution that ends in one box."""
    boxed = final_answer(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    return read_reference(boxed) if boxed else []
