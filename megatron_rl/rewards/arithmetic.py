"""The verifier of the arithmetic task (megatron_rl.data.arithmetic_task)."""

from __future__ import annotations

from megatron_rl.data.sample import Prompt, Verdict


def verify_arithmetic(prompt: Prompt, response: str) -> Verdict:
    """Right if the text after the only '#' is exactly the answer; the steps before it are not judged."""
    parts = response.split("#")
    correct = len(parts) == 2 and parts[1] == prompt.answer
    return Verdict(float(correct), correct)


def check_arithmetic_answer(answer: str) -> str | None:
    """None if the reference is usable. No response could match one with '#', and any could match an empty one."""
    return None if answer and "#" not in answer else f"{answer[:100]!r} is no answer; expected text without '#'"


verify_arithmetic.check_answer = check_arithmetic_answer  # type: ignore[attr-defined]
