"""Reference answers are tried before anything is sampled: `check_answer`, and the processes that ask it."""

from __future__ import annotations

import pytest

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.judges import Judges
from megatron_rl.rewards.math import verify_math
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.registry import check_answer

UNREADABLE = ["", " ", "\\"]


def prompt(answer: str, verifier: str = "math") -> Prompt:
    return Prompt(id=answer, text="", token_ids=(), answer=answer, verifier=verifier)


@pytest.mark.parametrize("answer", ["18", "-3.50", "1e22", "6.02e23", "\\frac{1}{2}", "x + 1", "1" * 900, "(1, 2)"])
def test_the_math_verifier_takes_what_it_can_judge_by(answer):
    assert check_answer("math", answer) is None
    assert verify_math(prompt(answer), f"\\boxed{{{answer}}}") is not None


@pytest.mark.parametrize("answer", UNREADABLE)
def test_the_math_verifier_refuses_the_references_that_would_end_a_run(answer):
    assert check_answer("math", answer)
    with pytest.raises(ValueError, match="the reference answer"):
        verify_math(prompt(answer), "\\boxed{18}")


def test_the_arithmetic_verifier_refuses_what_any_or_no_response_would_match():
    assert check_answer("arithmetic", "19") is None
    assert check_answer("arithmetic", "")
    assert check_answer("arithmetic", "1#9")


def test_a_verifier_without_a_check_takes_every_answer_and_is_asked_once(monkeypatch):
    assert check_answer("verifier_examples:shaped", "") is None
    asked = []
    judge = Judges.judge
    monkeypatch.setattr(
        Judges, "judge", lambda self, name, answers: asked.extend(answers) or judge(self, name, answers)
    )
    assert check_references([prompt(answer, "verifier_examples:shaped") for answer in ("", "a", "b")]) == {}
    assert [answer.prompt.answer for answer in asked] == [""]


def test_references_are_checked_once_each_in_processes_of_their_own():
    """One that ends its process, or raises, is as bad as one that is refused."""
    checked = "verifier_examples:checked"
    prompts = [prompt(a, checked) for a in ("good", "bad", "bad", "dies", "raises", "7")] + [prompt("\\")]
    problems = check_references(prompts)
    assert problems.keys() == {(checked, "bad"), (checked, "dies"), (checked, "raises"), ("math", "\\")}
    assert problems[checked, "bad"] == "'bad' is bad"
    assert "its process ended" in problems[checked, "dies"]
    assert problems[checked, "raises"] == "KeyError: 'unit'"


def test_no_process_starts_for_plain_numbers(monkeypatch):
    monkeypatch.setattr("megatron_rl.rewards.judges._Worker", None)
    assert check_references([prompt("18"), prompt("-2.5"), prompt("19", "arithmetic")]) == {}


def test_the_caller_says_what_the_workers_are():
    made = []
    check_references([prompt("x + 1")], lambda: made.append(Judges(1, 5.0)) or made[-1])
    assert len(made) == 1
