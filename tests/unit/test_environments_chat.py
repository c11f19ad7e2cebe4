"""Chat templates as the package renderers writes them: append-only, with tools, and refused before a run if not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from chat_tokenizer import TURNS, make_chat_tokenizer

from megatron_rl.data.sample import Prompt
from megatron_rl.environments.calculator import Calculator
from megatron_rl.environments.dialogue import ChatDialogue, make_dialogue
from megatron_rl.environments.env import EnvError, Opening, call_reset, call_step

TOKENIZER = make_chat_tokenizer()
STOP = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_a_tool_is_offered_called_and_answered_by_appending_alone() -> None:
    dialogue, calculator = ChatDialogue(TOKENIZER, "qwen3"), Calculator()
    assert STOP in dialogue.stop_token_ids
    opening = call_reset(calculator, Prompt("p", "What is 6*7?", (), "42", "math"))
    history = dialogue.open(opening)
    text = TOKENIZER.decode(history)
    assert '"name": "calculator"' in text
    assert text.endswith("<|im_start|>user\nWhat is 6*7?<|im_end|>\n<|im_start|>assistant\n")

    said = [*ids(f"<think>\nI need the tool.\n</think>\n\n{CALL}"), STOP]
    message = dialogue.read(history, said, opening)
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "6*7"}}}
    assert message["tool_calls"] == [call]
    assert "I need the tool." in message["reasoning_content"]
    step = call_step(calculator, message)
    answer = dialogue.answer(history, said, step.messages, opening)
    assert answer is not None
    appended = TOKENIZER.decode(answer)
    assert "<tool_response>\n42\n</tool_response>" in appended
    assert appended.endswith("<|im_start|>assistant\n")

    history += said + answer
    last = dialogue.read(history, [*ids("It is 42."), STOP], opening)
    assert last["content"].strip() == "It is 42."
    assert call_step(calculator, last).done


def test_reasoning_of_earlier_turns_stays_when_the_user_speaks_again() -> None:
    dialogue = ChatDialogue(TOKENIZER, "qwen3")
    opening = Opening([{"role": "user", "content": "guess"}], [])
    history, said = dialogue.open(opening), [*ids("<think>\nhalf\n</think>\n\n16"), STOP]
    answer = dialogue.answer(history, said, [{"role": "user", "content": ">"}], opening)
    assert answer is not None
    assert TOKENIZER.decode(answer) == "\n<|im_start|>user\n><|im_end|>\n<|im_start|>assistant\n"


def test_nothing_is_appended_if_the_template_would_write_the_message_anew() -> None:
    """The message stopped within its reasoning, or went on behind the token that ends it."""
    dialogue = ChatDialogue(TOKENIZER, "qwen3")
    opening = Opening([{"role": "user", "content": "guess"}], [])
    for said in ([*ids("<think>\nhalf"), STOP], [*ids("16"), STOP, *ids("17")]):
        assert dialogue.answer(dialogue.open(opening), said, [{"role": "user", "content": ">"}], opening) is None


@pytest.mark.parametrize(
    ("tokenizer", "name", "problem"),
    [
        (TOKENIZER, "qwen", "found 'qwen', expected one of .*qwen3.*, or null for text alone"),
        (TOKENIZER, "default", "found 'default', expected one of"),
        (make_chat_tokenizer(TURNS), "qwen3", "'qwen3' does not fit the tokenizer in model.path: .*<tool_call>"),
    ],
)
def test_a_renderer_that_cannot_be_used_is_named(tokenizer: Any, name: str, problem: str) -> None:
    with pytest.raises(EnvError, match=rf"rollout\.environment\.renderer: {problem}"):
        make_dialogue(tokenizer, name)


def test_a_renderer_that_cannot_append_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the package's renderers is so for every message, but a template of its own may be."""
    from renderers.qwen3 import Qwen3Renderer

    bridge = Qwen3Renderer.bridge_to_next_turn

    def only_users(self: Any, history: Any, completion: Any, messages: Any, **options: Any) -> Any:
        return None if messages[0]["role"] == "tool" else bridge(self, history, completion, messages, **options)

    monkeypatch.setattr(Qwen3Renderer, "bridge_to_next_turn", only_users)
    with pytest.raises(EnvError, match="'qwen3' cannot append a message of role tool to a conversation without"):
        make_dialogue(TOKENIZER, "qwen3")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "renderers", None)
    with pytest.raises(EnvError, match=r"needs the package renderers .*pip install 'megatron_rl\[environments\]'"):
        make_dialogue(TOKENIZER, "qwen3")
