"""Environments: the built-in ones, what counts as a step's result, and what a conversation's rewards add up to."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import make_tokenizer
from turn_environments import Adding

from megatron_rl.data.sample import Prompt, Sample, Verdict
from megatron_rl.environments.calculator import Calculator, compute
from megatron_rl.environments.dialogue import PlainDialogue, make_dialogue
from megatron_rl.environments.env import EnvError, EnvStep, Opening, Score, call_reset, call_step, get_env
from megatron_rl.environments.guessing import Guessing

PROMPT = Prompt("p", "3+5=", (), "8", "arithmetic")


def say(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3+5", "8"),
        (" (1 + 2) * -4 ", "-12"),
        ("1/4", "0.25"),
        ("2/3", "2/3"),
        (".1+.2", "0.3"),
        ("007+010", "17"),
        ("1/0", "error"),
        ("2**9", "error"),
        ("9*(", "error"),
        ("", "error"),
        ("x", "error"),
        ("1" * 40, "error"),
        ("(" * 150, "error"),
        ("1+" * 150 + "1", "error"),
        ("__import__('os')", "error"),
    ],
)
def test_the_calculator_computes_exactly_and_nothing_but_arithmetic(expression: str, value: str) -> None:
    assert compute(expression) == value


def test_a_message_that_ends_with_an_equals_sign_is_computed_and_another_ends_the_conversation() -> None:
    calculator = Calculator()
    assert call_reset(calculator, PROMPT).messages == [{"role": "user", "content": "3+5="}]
    answer = call_step(calculator, say("let me see: 3+5="))
    assert answer == EnvStep([{"role": "tool", "name": "calculator", "content": "8"}], None, None, False)
    assert call_step(calculator, say("#8")) == EnvStep([], None, None, True)
    assert call_step(calculator, say("8=8 is it")).done


def test_the_calculator_answers_each_call_of_a_chat_template() -> None:
    arguments: list[Any] = [{"expression": "6*7"}, '{"expression":"1"}', "{", {"other": 1}, {"expression": 3}]
    calls = [{"function": {"name": "calculator", "arguments": each}} for each in arguments]
    step = call_step(Calculator(), say("", tool_calls=calls))
    assert [message["content"] for message in step.messages] == ["42", "1", "error", "error", "error"]
    assert not step.done
    assert call_reset(Calculator(), PROMPT).tools[0]["function"]["name"] == "calculator"


def test_the_guessing_game_says_higher_or_lower_until_the_number_is_found() -> None:
    game = Guessing()
    call_reset(game, PROMPT)
    assert call_step(game, say("5")) == EnvStep([{"role": "user", "content": ">"}], 0.0, None, False)
    assert call_step(game, say("not 5 but 12")) == EnvStep([{"role": "user", "content": "<"}], 0.0, None, False)
    assert call_step(game, say("8")) == EnvStep([], 1.0, True, True)
    assert call_step(game, say("well")) == EnvStep([], 0.0, False, True)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (None, "expected a tuple of messages, reward and done"),
        (([], 1.0), "expected a tuple of messages, reward and done"),
        (([], 1.0, 1), "step returned done = 1"),
        (([], 1.0, False), "no messages, but the conversation is not done"),
        (("hello", 1.0, False), "step returned 'hello' as messages, expected a list"),
        ((["hello"], 1.0, False), "step returned the message 'hello', expected role and content"),
        (([{"role": "user"}], 1.0, False), "expected role and content as text"),
        (([{"role": "user", "content": 8}], 1.0, False), "expected role and content as text"),
        (([{"role": "assistant", "content": "8"}], 1.0, False), "another role than assistant"),
        (([], float("nan"), True), "step returned the reward nan"),
        (([], "good", True), "step returned the reward 'good'"),
        (([], Verdict(float("inf"), True), True), "expected a finite number, a Verdict or None"),
    ],
)
def test_a_step_that_returns_anything_else_is_refused(returned: Any, problem: str) -> None:
    class Odd(Adding):
        def step(self, message: dict[str, Any]) -> Any:
            return returned

    with pytest.raises(ValueError, match=problem):
        call_step(Odd(), say("8"))


def test_an_opening_without_messages_is_refused() -> None:
    class Silent(Adding):
        def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
            return []

    with pytest.raises(ValueError, match="reset returned no messages"):
        call_reset(Silent(), PROMPT)


@pytest.mark.parametrize(
    ("judged", "whole", "part"),
    [
        ([None, None], None, Verdict(0.0, False)),
        ([0.25, None, 0.5], Verdict(0.75, True), Verdict(0.75, False)),
        ([-1.0, 0.5], Verdict(-0.5, False), Verdict(-0.5, False)),
        ([Verdict(0.5, False), 0.5], Verdict(1.0, False), Verdict(1.0, False)),
        ([Verdict(0.0, False), Verdict(0.0, True)], Verdict(0.0, True), Verdict(0.0, False)),
    ],
)
def test_rewards_add_up_and_the_last_verdict_says_what_is_correct(
    judged: list[Verdict | float | None], whole: Verdict | None, part: Verdict
) -> None:
    class Judging(Adding):
        def step(self, message: dict[str, Any]) -> Any:
            return [], judged.pop(0), True

    score, env = Score(), Judging()
    for _ in range(len(judged)):
        score = score.after(call_step(env, say("")))
    assert (score.of_whole(), score.of_part()) == (whole, part)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("calculater", "no such environment; did you mean 'calculator'"),
        ("chess", "there are calculator, guessing. Your own is written package.module:Class"),
        ("no_such_module:Env", "No module named 'no_such_module'"),
        ("turn_environments:Nobody", "has no attribute 'Nobody'"),
        ("turn_environments:WithoutStep", "expected a class with reset and step, found a class without step"),
        ("turn_environments:no_class", "expected a class with reset and step, found function"),
    ],
)
def test_an_environment_that_does_not_exist_is_named(name: str, problem: str) -> None:
    with pytest.raises(EnvError, match=problem) as caught:
        get_env(name)
    assert str(caught.value).startswith(f"environment {name!r}: ")


def test_plain_text_is_appended_after_the_token_that_ended_the_message() -> None:
    tokenizer = make_tokenizer()
    dialogue = make_dialogue(tokenizer, None)
    assert isinstance(dialogue, PlainDialogue)
    opening = Opening([{"role": "system", "content": "add "}, {"role": "user", "content": "3+5="}], [])
    history = dialogue.open(opening)
    assert tokenizer.decode(history) == "add 3+5="
    said = [*tokenizer.encode("3+5="), tokenizer.eos_token_id]
    assert dialogue.read(history, said, opening) == say("3+5=")
    answer = dialogue.answer(history, said, [{"role": "tool", "content": "8"}], opening)
    assert answer == tokenizer.encode("8")


def test_the_last_turn_and_the_number_of_turns_come_from_the_mask() -> None:
    prompt = Prompt("p", "", (5, 6), "", "")
    sample = Sample.start(prompt, 0)
    assert (sample.turns, sample.last_turn_ids.tolist()) == (0, [])
    sample = sample.extend([7, 8], [-1.0, -1.0], 0)
    assert (sample.turns, sample.last_turn_ids.tolist()) == (1, [7, 8])
    sample = sample.extend([9], None, 0).extend([10], [-1.0], 0).extend([11], [-1.0], 1)
    assert (sample.turns, sample.last_turn_ids.tolist(), sample.response_tokens) == (2, [10, 11], 4)
