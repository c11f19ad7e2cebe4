"""The math verifier: verdicts match a person's, unreadable references are refused, and nothing takes long."""

from __future__ import annotations

import pytest
from math_verdicts import KNOWN, VERDICTS

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.math import verify_math
from megatron_rl.rewards.verifiers import check_answer


def verdict(reference: str, response: str) -> bool:
    found = verify_math(Prompt("", "", (), reference, "math"), response)
    assert found == Verdict(float(found.correct), found.correct)
    return found.correct


def test_verdicts_match_a_persons_verdicts() -> None:
    """Some expressions are too expensive to compute: computing one would exceed the test's time limit."""
    found = [(*case, verdict(case[0], case[1])) for case in VERDICTS]
    assert [case[:4] for case in found if case[2] != case[4]] == []


@pytest.mark.parametrize(("reference", "response", "correct"), KNOWN)
def test_known_wrong_verdicts_match_the_documentation(reference: str, response: str, correct: bool) -> None:
    assert verdict(reference, response) == correct


def test_the_table_has_similar_numbers_of_right_and_wrong_answers() -> None:
    right = sum(case[2] for case in VERDICTS)
    assert len(VERDICTS) >= 300
    assert len({case[:2] for case in VERDICTS}) == len(VERDICTS)
    assert 0.4 < right / len(VERDICTS) < 0.6


def test_a_verdict_does_not_depend_on_earlier_verdicts() -> None:
    """math-verify caches parsed expressions."""
    cases = [case for case in VERDICTS if len(case[1]) < 100][::5]
    for case in [*cases, *reversed(cases)]:
        assert verdict(case[0], case[1]) == case[2], case


def test_every_reference_of_the_table_can_be_read() -> None:
    found = {reference: check_answer("math", reference) for reference in {case[0] for case in VERDICTS}}
    assert {reference: why for reference, why in found.items() if why is not None} == {}


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        "\\",
        "$",
        "\\boxed{}",
        "\\frac{1}{",
        "(1, 2",
        "\\frac{1}{0}",
        "#",
        "?",
        "9" * 5000,
        "\\text{}",
        "{}",
        "\n",
    ],
)
def test_an_unreadable_reference_is_refused(reference: str) -> None:
    problem = check_answer("math", reference)
    assert problem is not None
    assert problem.startswith(repr(reference[:100]))
    assert "expected a number, expression" in problem
    with pytest.raises(ValueError, match="cannot be read; expected a number"):
        verify_math(Prompt("", "", (), reference, "math"), "\\boxed{5}")


@pytest.mark.parametrize("reference", ["\\$18", "\\frac{1}\n{2}", "So it is $\\boxed{18}$.", "1e-05", "1.8e19", "18"])
def test_references_in_many_notations_are_accepted(reference: str) -> None:
    assert check_answer("math", reference) is None


def test_other_verifiers_check_their_own_references() -> None:
    assert check_answer("arithmetic", "8") is None
    assert "expected text without '#'" in str(check_answer("arithmetic", "8#"))
    assert check_answer("verifier_examples:shaped", "") is None
