"""The arithmetic task: problems, texts and specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.arithmetic_task import ALPHABET, ArithmeticTask, is_held_out, prompt_text, response_text
from megatron_rl.data.records import DataError
from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.arithmetic import verify_arithmetic


def test_prompt_and_response_texts_by_hand():
    assert prompt_text([3, 5, 2, 9]) == "3+5+2+9="
    assert response_text([3, 5, 2, 9]) == "3+5=8,8+2=10,10+9=19#19"


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12))
def test_every_step_is_right_and_the_verifier_accepts_the_reference(terms):
    response = response_text(terms)
    steps, _, answer = response.partition("#")
    for step in steps.split(","):
        left, _, right = step.partition("=")
        assert sum(map(int, left.split("+"))) == int(right)
    assert int(answer) == sum(terms)
    assert set(prompt_text(terms) + response) <= set(ALPHABET)
    prompt = Prompt("", prompt_text(terms), (), str(sum(terms)), "arithmetic")
    assert verify_arithmetic(prompt, response).correct
    assert not verify_arithmetic(prompt, response[:-1]).correct


def test_nine_terms_make_responses_of_49_to_65_characters():
    lengths = [len(response_text(terms)) for terms in ArithmeticTask(count=2000).problems()]
    assert min(lengths) >= 49
    assert max(lengths) <= 65
    assert len(response_text([9] * 9)) == 65
    assert len(response_text([1] * 9)) == 49


def test_problems_depend_only_on_seed_and_index():
    task = ArithmeticTask(count=300, seed=3)
    assert task.problems() == ArithmeticTask(count=300, seed=3).problems()
    assert task.problems()[:50] == ArithmeticTask(count=50, seed=3).problems()
    assert task.problems() != ArithmeticTask(count=300, seed=4).problems()


@pytest.mark.parametrize("terms", [2, 3, 9])
def test_train_and_held_out_splits_share_no_problem_and_repeat_none(terms):
    """With two terms there are only 81 problems, so the splits would overlap without the hash."""
    count = 6 if terms == 2 else 60
    train = ArithmeticTask(terms, "train", 60, seed=0).problems()
    heldout = ArithmeticTask(terms, "heldout", count, seed=1).problems()
    assert len({*train, *heldout}) == 60 + count
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, heldout))


def test_the_error_for_too_many_problems_says_how_many_exist():
    with pytest.raises(DataError, match=r"found 7[0-9] problems of 2 terms in split train, not 81"):
        ArithmeticTask(terms=2, count=81).problems()


def test_a_specification_overrides_the_defaults():
    assert ArithmeticTask.parse("arithmetic:") == ArithmeticTask()
    spec = "arithmetic:terms=4,split=heldout,count=7,seed=5"
    assert ArithmeticTask.parse(spec) == ArithmeticTask(4, "heldout", 7, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("term=4", "no key 'term'; did you mean 'terms'?"),
        ("length=4", "no key 'length'; there are terms, split, count, seed"),
        ("terms", "terms: expected a whole number of at most 18 digits, found ''"),
        ("terms=4.5", "terms: expected a whole number of at most 18 digits, found '4.5'"),
        ("seed=-1", "seed: expected a whole number of at most 18 digits, found '-1'"),
        ("terms=4,terms=5", "terms: given twice"),
        ("split=test", "split: expected train or heldout, found 'test'"),
        ("terms=1", "terms: expected 2 to 1000, found 1"),
        ("count=0", "count: expected 1 to 10000000, found 0"),
    ],
)
def test_the_error_for_a_wrong_specification_names_the_mistake(spec, message):
    with pytest.raises(DataError) as caught:
        ArithmeticTask.parse(f"arithmetic:{spec}")
    assert message in str(caught.value)
    assert f"arithmetic:{spec}" in str(caught.value)


@pytest.mark.parametrize("spec", ["count=" + "9" * 5000, "count=٣", "terms=" + "9" * 18, "count=10000001", "x" * 9999])
def test_an_absurdly_large_number_is_refused_at_once(spec):
    with pytest.raises(DataError) as caught:
        ArithmeticTask.parse(f"arithmetic:{spec}")
    assert len(str(caught.value)) < 400


def test_more_problems_than_exist_give_an_error_soon():
    with pytest.raises(DataError, match="not 10000000"):
        ArithmeticTask(terms=2, count=10_000_000).problems()
