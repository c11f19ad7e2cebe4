"""Finds verifiers by name and calls them. A verifier is imported when first used: math-verify imports sympy.

The names of a verifier's parameters say what it is given (`asked_by`), by keyword unless it takes them by
position only.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.errors import UserError
from megatron_rl.named_code import ResultError, find_named

Verifier = Callable[..., Any]

VERIFIERS = {
    "arithmetic": "megatron_rl.rewards.arithmetic:verify_arithmetic",
    "math": "megatron_rl.rewards.math:verify_math",
    "reasoning-gym": "megatron_rl.rewards.gym_scores:verify_gym",
}

RECORD, GROUP = "record", "responses"
"""Parameters for all fields of the prompt's record, and for all responses to the prompt."""
GIVEN = ("prompt", RECORD, "response", GROUP)

CHECKED, UNCHECKED = Verdict(1.0, True), Verdict(0.0, False)
"""Results of the check of a reference answer, in place of a verdict."""


class RewardError(UserError):
    """A verifier does not exist, fails, or gives a reward that cannot be used. Names the verifier and the prompt."""


def get_verifier(name: str) -> Verifier:
    """One of VERIFIERS, or a user's own as `package.module:function`. Raises RewardError if it does not exist, or has
    other parameters than those of GIVEN."""
    try:
        verifier: Verifier = find_named("verifier", name, VERIFIERS, "package.module:function")
    except LookupError as error:
        raise RewardError(str(error)) from None
    if not callable(verifier):
        raise RewardError(f"verifier {name!r}: expected a function, found {type(verifier).__name__}")
    try:
        asked_by(verifier)
    except ValueError as error:
        raise RewardError(f"verifier {name!r}: {error}") from None
    return verifier


@functools.cache
def asked_by(verifier: Verifier) -> frozenset[str]:
    """The names of GIVEN that are among the verifier's parameters. Raises ValueError, which says what was expected, if
    it has another parameter without a default, and unless it takes either one response or all of a group."""
    expected = "expected prompt or record or both, and response or responses"
    try:
        parameters = inspect.signature(verifier).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"its parameters cannot be read; {expected}: write a function around it") from None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [each for each in parameters if each.kind not in variadic]
    other = [each.name for each in named if each.name not in GIVEN and each.default is inspect.Parameter.empty]
    asked = frozenset(each.name for each in named if each.name in GIVEN)
    if other or len(asked & {"response", GROUP}) != 1:
        found = (str(each.replace(annotation=each.empty)) for each in parameters)
        raise ValueError(f"found the parameters ({', '.join(found)}), {expected}")
    return asked


def judges_groups(verifier: Verifier) -> bool:
    """Whether one call judges all responses to a prompt."""
    return GROUP in asked_by(verifier)


def check_answer(name: str, answer: str) -> str | None:
    """None if the verifier of that name can judge by the reference answer, else the reason.

    Calls the attribute `check_answer(answer) -> str | None` of the verifier's function. A verifier without it accepts
    every answer. Raises RewardError if there is no such verifier.
    """
    check = getattr(get_verifier(name), "check_answer", None)
    return None if check is None else check(answer)


def call_check(verifier: Verifier, answer: str) -> Verdict:
    """CHECKED, or UNCHECKED if the verifier has no check.

    Raises what the check raises, and ResultError with the problem if the reference answer has one.
    """
    check = getattr(verifier, "check_answer", None)
    if check is None:
        return UNCHECKED
    problem = check(answer)
    if problem is not None:
        raise ResultError(problem)
    return CHECKED


def call_verifier(verifier: Verifier, prompt: Prompt, responses: Sequence[str]) -> list[Verdict | ResultError]:
    """Calls the verifier once. Verdicts hold plain Python numbers; a ResultError takes the place of a result that is no
    verdict.

    `responses` has one response, unless the verifier judges groups. Raises what the verifier raises, and ResultError
    unless a verifier of groups gives a list of as many results.
    """
    given = {"prompt": prompt, RECORD: prompt.record, "response": responses[0], GROUP: list(responses)}
    by_place = [each for each in inspect.signature(verifier).parameters.values() if each.kind is each.POSITIONAL_ONLY]
    by_name = asked_by(verifier) - {each.name for each in by_place}
    values = (given.get(each.name, each.default) for each in by_place)
    result = verifier(*values, **{name: given[name] for name in by_name})
    if not judges_groups(verifier):
        return [_settled(result)]
    if not isinstance(result, list | tuple | np.ndarray) or len(result) != len(responses):
        found = f"{len(result)} of them" if isinstance(result, list | tuple) else f"a {type(result).__name__}"
        raise ResultError(f"expected a list of {len(responses)} results, one for each response, got {found}")
    return [_settled(each) for each in result]


def _settled(result: object) -> Verdict | ResultError:
    try:
        return as_verdict(result)
    except ResultError as error:
        return error


def as_verdict(result: object) -> Verdict:
    """The verdict that a verifier's result stands for: True and False are right and wrong, with rewards of 1 and 0; a
    number is the reward, and right if it is above 0. Raises ResultError for anything else."""
    reward = result.reward if isinstance(result, Verdict) else result
    if not isinstance(reward, bool | np.bool_ | numbers.Real):
        raise ResultError(f"expected a Verdict, a number, True or False, got {type(reward).__name__}")
    reward = float(reward)
    if not math.isfinite(reward):
        raise ResultError(f"the reward is {reward}, expected a finite number")
    return Verdict(reward, bool(result.correct) if isinstance(result, Verdict) else reward > 0)
