"""Mathematical answers, compared by math-verify."""

from __future__ import annotations

from megatron_rl.data.sample import Prompt, Verdict


def verify_math(prompt: Prompt, response: str) -> Verdict:
    """Right when the last answer in the response equals the reference, as expressions.

    math-verify ends a comparison that takes too long by a signal, so this runs in a process's main thread only.
    """
    from math_verify import parse, verify

    correct = bool(verify(parse(_as_latex(prompt.answer)), parse(response)))
    return Verdict(float(correct), correct)


def _as_latex(answer: str) -> str:
    """math-verify takes bare expressions for prose; a reference is one."""
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
