"""Reference answers are checked before anything is sampled: `check_answer`, and the processes that call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_tokenizer

from megatron_rl.data.files import DataError
from megatron_rl.data.prompts import Fields
from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rewards.judges import Failure, Judges
from megatron_rl.rewards.math import verify_math
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.verifiers import UNCHECKED, RewardError, check_answer

UNREADABLE = ["", " ", "\\"]


def prompt(answer: str, verifier: str = "math") -> Prompt:
    return Prompt(id=answer, text="", token_ids=(), answer=answer, verifier=verifier)


@pytest.mark.parametrize("answer", ["18", "-3.50", "1e22", "6.02e23", "\\frac{1}{2}", "x + 1", "1" * 900, "(1, 2)"])
def test_the_math_verifier_accepts_usable_references(answer):
    assert check_answer("math", answer) is None
    assert verify_math(prompt(answer), f"\\boxed{{{answer}}}") is not None


@pytest.mark.parametrize("answer", UNREADABLE)
def test_the_math_verifier_refuses_unusable_references(answer):
    assert check_answer("math", answer)
    with pytest.raises(ValueError, match="the reference answer"):
        verify_math(prompt(answer), "\\boxed{18}")


def test_the_arithmetic_verifier_refuses_unusable_references():
    assert check_answer("arithmetic", "19") is None
    assert check_answer("arithmetic", "")
    assert check_answer("arithmetic", "1#9")


def test_a_verifier_without_check_answer_accepts_all_and_is_asked_once(monkeypatch):
    assert check_answer("verifier_examples:shaped", "") is None
    asked = []
    check = Judges.check

    def asks(self, name, prompts):
        asked.extend(prompts)
        return check(self, name, prompts)

    monkeypatch.setattr(Judges, "check", asks)
    with Judges() as pool:
        assert check_references([prompt(answer, "verifier_examples:shaped") for answer in ("", "a", "b")], pool) == {}
    assert [each.answer for each in asked] == [""]


def test_each_reference_is_checked_once_in_a_worker_process():
    """A reference counts as bad if the check refuses it or raises. A user's check may refuse numbers."""
    checked = "verifier_examples:checked"
    prompts = [prompt(a, checked) for a in ("good", "bad", "bad", "raises", "7")] + [prompt("\\")]
    with Judges() as pool:
        problems = check_references(prompts, pool)
    assert problems.keys() == {(checked, "bad"), (checked, "raises"), (checked, "7"), ("math", "\\")}
    assert problems[checked, "bad"] == "'bad' is bad"
    assert problems[checked, "raises"].startswith("KeyError: 'unit' (")


@pytest.mark.parametrize(
    ("answer", "said"), [("dies", "its process ended with exit status 3"), ("hangs", "took over 0.5 s")]
)
def test_a_users_check_that_does_not_answer_gives_one_error_at_once(answer: str, said: str) -> None:
    name = "verifier_examples:unanswering"
    prompts = [prompt("good", name)] + [prompt(f"{answer}{n or ''}", name) for n in range(40)]
    told = f"verifier '{name}': its check_answer .*'{answer}'.*{said}"
    with Judges(1, 0.5) as pool, pytest.raises(RewardError, match=told):
        check_references(prompts, pool)


def test_a_slow_import_of_a_verifier_does_not_count_as_a_timeout(tmp_path, monkeypatch):
    (tmp_path / "verifier_slow.py").write_text(
        "import time\ntime.sleep(2)\ndef judge(prompt, response): ...\n"
        "judge.check_answer = lambda answer: 'is bad' if answer == 'bad' else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "verifier_slow:judge"
    with Judges(1, 1.0) as pool:
        problems = check_references([prompt("good", name), prompt("bad", name)], pool)
    assert problems == {(name, "bad"): "is bad"}


def test_a_failed_verifier_import_is_not_reported_as_a_bad_reference():
    with Judges() as pool, pytest.raises(RewardError, match="No module named 'nowhere'"):
        check_references([prompt("18", "nowhere:judge")], pool)


def test_a_slow_built_in_check_does_not_refuse_the_reference(monkeypatch):
    monkeypatch.setattr(
        "megatron_rl.rewards.judges._Worker.ask", lambda *given: [Failure("took over 1 s", silent=True)]
    )
    with Judges(1, 1.0) as pool:
        assert check_references([prompt("x + 1"), prompt("x + 2")], pool) == {}


def test_only_ascii_digits_skip_the_check_as_plain_numbers(monkeypatch):
    asked = []

    def asks(self, name, prompts):
        asked.extend(prompts)
        return [UNCHECKED]

    monkeypatch.setattr(Judges, "check", asks)
    with Judges() as pool:
        check_references([prompt("18"), prompt("١٨")], pool)
    assert [each.answer for each in asked] == ["١٨"]


def test_checking_plain_numbers_starts_no_process(monkeypatch):
    monkeypatch.setattr("megatron_rl.rewards.judges._Worker", None)
    with Judges() as pool:
        assert check_references([prompt("18"), prompt("-2.5"), prompt("19", "arithmetic")], pool) == {}


# ---- when data is loaded -----------------------------------------------------------------------------------------


def test_unusable_reference_answers_are_reported_when_data_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    answers = ("18", "\\", "", "x + 1", "1")
    path.write_text("".join(json.dumps({"prompt": "q", "answer": answer}) + "\n" for answer in answers))
    with pytest.raises(DataError) as caught:
        load_prompts(str(path), Fields("prompt", "answer"), make_tokenizer(), 99)
    first, _, rest = str(caught.value).partition(" (as at ")
    assert first.startswith(f"{path}:2: answer: verifier 'math' cannot judge by this reference: '\\\\'")
    assert rest == f"{path}:3)"


def test_a_number_reaches_the_verifier_with_its_original_digits(tmp_path: Path) -> None:
    numbers = ["0.00001", "6.02e23", "18446744073709551616", "10000000000000000.0", "1.10"]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "q", "answer": {number}}}\n' for number in numbers))
    prompts = load_prompts(str(path), Fields("prompt", "answer"), make_tokenizer(), 99)
    assert [prompts[i].answer for i in range(len(numbers))] == numbers
