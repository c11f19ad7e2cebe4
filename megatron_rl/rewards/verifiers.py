"""Finds verifiers by name and calls them. A verifier is imported when first used: math-verify imports sympy."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.errors import UserError
from megatron_rl.named_code import find_named

Verifier = Callable[[Prompt, str], Verdict]

VERIFIERS = {
    "arithmetic": "megatron_rl.rewards.arithmetic:verify_arithmetic",
    "math": "megatron_rl.rewards.math:verify_math",
    "reasoning-gym": "megatron_rl.rewards.gym_scores:verify_gym",
}


CHECKED, UNCHECKED = Verdict(1.0, True), Verdict(0.0, False)
"""Results of the check of a reference answer, in place of a verdict."""


class RewardError(UserError):
    """A verifier does not exist, fails, or gives a reward that cannot be used. Names the verifier and the prompt."""


def get_verifier(name: str) -> Verifier:
    """One of VERIFIERS, or a user's own as `package.module:function`. Raises RewardError if it does not exist."""
    try:
        verifier: Verifier = find_named("verifier", name, VERIFIERS, "package.module:function")
    except LookupError as error:
        raise RewardError(str(error)) from None
    if not callable(verifier):
        raise RewardError(f"verifier {name!r}: expected a function, found {type(verifier).__name__}")
    return verifier


def check_answer(name: str, answer: str) -> str | None:
    """None if the verifier of that name can judge by the reference answer, else the reason.

    Calls the attribute `check_answer(answer) -> str | None` of the verifier's function. A verifier without it accepts
    every answer. Raises RewardError if there is no such verifier.
    """
    check = getattr(get_verifier(name), "check_answer", None)
    return None if check is None else check(answer)


def call_check(verifier: Verifier, answer: str) -> Verdict:
    """CHECKED, or UNCHECKED if the verifier has no check.

    Raises what the check raises, and ValueError with the problem if the reference answer has one.
    """
    check = getattr(verifier, "check_answer", None)
    if check is None:
        return UNCHECKED
    problem = check(answer)
    if problem is not None:
        raise ValueError(problem)
    return CHECKED


def call_verifier(verifier: Verifier, prompt: Prompt, response: str) -> Verdict:
    """Calls the verifier; the verdict holds plain Python numbers.

    Raises what the verifier raises, and ValueError if the result is not a usable verdict.
    """
    verdict = verifier(prompt, response)
    if not isinstance(verdict, Verdict):
        raise ValueError(f"expected a Verdict, got {type(verdict).__name__}")
    if not math.isfinite(verdict.reward):
        raise ValueError(f"the reward is {verdict.reward}, expected a finite number")
    return Verdict(float(verdict.reward), bool(verdict.correct))
