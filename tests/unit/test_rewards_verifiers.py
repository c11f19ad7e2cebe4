"""What a verifier may take and return: the names of its parameters, and what its result stands for."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.verifiers import as_verdict, asked_by, call_verifier

RECORD = {"question": "2+2", "points": {"4": 0.5}}
PROMPT = Prompt("q", "2+2=", (7,), "4", "mine", RECORD)


def prompted(prompt: Prompt, response: str) -> list[object]:
    return [prompt, response]


def recorded(record: dict[str, Any], response: str) -> list[object]:
    return [record, response]


def turned(response: str, prompt: Prompt, record: dict[str, Any], strict: bool = True, **more: Any) -> list[object]:
    return [prompt, record, response, strict, more]


def alone(response: str) -> list[object]:
    return [response]


def grouped(prompt: Prompt, responses: list[str]) -> list[object]:
    return [prompt, responses]


def placed(strict: bool = True, record: Any = None, /, response: str = "") -> list[object]:
    return [strict, record, response]


class Callable:
    def __call__(self, record: dict[str, Any], *, response: str) -> list[object]:
        return [record, response]


@pytest.mark.parametrize(
    ("verifier", "given"),
    [
        (prompted, [PROMPT, "four"]),
        (recorded, [RECORD, "four"]),
        (turned, [PROMPT, RECORD, "four", True, {}]),
        (alone, ["four"]),
        (grouped, [PROMPT, ["four"]]),
        (Callable(), [RECORD, "four"]),
        (placed, [True, RECORD, "four"]),
        (lambda response, /: [response], ["four"]),
        (functools.partial(turned, strict=False), [PROMPT, RECORD, "four", False, {}]),
    ],
)
def test_a_verifier_gets_what_the_names_of_its_parameters_say(verifier: Any, given: list[object]) -> None:
    seen: list[object] = []

    @functools.wraps(verifier, updated=())
    def spying(*placed: Any, **named: Any) -> Any:
        seen.extend(verifier(*placed, **named))
        return [1.0] if "responses" in named else 1.0

    assert call_verifier(spying, PROMPT, ["four"]) == [Verdict(1.0, True)]
    assert seen == given


@pytest.mark.parametrize(
    ("verifier", "found"),
    [
        (lambda question, answer: 1.0, "(question, answer)"),
        (lambda prompt: 1.0, "(prompt)"),
        (lambda prompt, response, extra_info: 1.0, "(prompt, response, extra_info)"),
        (lambda prompt, response, responses: 1.0, "(prompt, response, responses)"),
        (lambda *given: 1.0, "(*given)"),
    ],
)
def test_other_parameters_are_refused_with_what_was_found(verifier: Any, found: str) -> None:
    with pytest.raises(ValueError, match="expected prompt or record or both, and response or responses") as caught:
        asked_by(verifier)
    assert f"found the parameters {found}" in str(caught.value)


def test_a_function_whose_parameters_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its parameters cannot be read; .* write a function around it"):
        asked_by(max)


@pytest.mark.parametrize(
    ("result", "reward", "correct"),
    [
        (True, 1.0, True),
        (False, 0.0, False),
        (np.bool_(True), 1.0, True),
        (1, 1.0, True),
        (-2, -2.0, False),
        (0, 0.0, False),
        (0.25, 0.25, True),
        (np.float32(0.5), 0.5, True),
        (np.int64(3), 3.0, True),
        (Fraction(1, 4), 0.25, True),
        (Verdict(0.25, False), 0.25, False),
        (Verdict(1, 1), 1.0, True),  # type: ignore[arg-type]
    ],
)
def test_what_a_result_stands_for(result: object, reward: float, correct: bool) -> None:
    verdict = as_verdict(result)
    assert verdict == Verdict(reward, correct)
    assert (type(verdict.reward), type(verdict.correct)) == (float, bool)


@pytest.mark.parametrize("result", [None, "1.0", [1.0], (1.0, True), {"reward": 1.0}, np.ones(1), 1j])
def test_anything_else_is_no_verdict(result: object) -> None:
    with pytest.raises(ValueError, match=f"expected a Verdict, a number, True or False, got {type(result).__name__}"):
        as_verdict(result)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_reward_is_finite(reward: float) -> None:
    for result in (reward, Verdict(reward, True)):
        with pytest.raises(ValueError, match="expected a finite number"):
            as_verdict(result)


def test_in_a_group_a_result_that_is_no_verdict_costs_its_own_response_alone() -> None:
    def judge(responses: list[str]) -> object:
        return np.array([1.0, np.nan, 0.0]) if responses[0] == "array" else [True, None, Verdict(0.5, False)]

    for first in ("list", "array"):
        one, lost, other = call_verifier(judge, PROMPT, [first, "b", "c"])
        assert one == Verdict(1.0, True)
        assert isinstance(lost, ValueError)
        assert isinstance(other, Verdict)


@pytest.mark.parametrize(
    ("result", "got"), [([1.0], "1 of them"), (1.0, "a float"), (None, "a NoneType"), ("ab", "a str")]
)
def test_a_group_needs_a_result_for_each_response(result: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"expected a list of 2 results, one for each response, got {got}"):
        call_verifier(lambda responses: result, PROMPT, ["a", "b"])
