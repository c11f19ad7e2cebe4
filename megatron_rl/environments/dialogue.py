"""Turns messages into token ids and back. The ids of a conversation are only appended to, and never tokenized again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_rl.data.chat import ChatFormat
from megatron_rl.environments.env import EnvError, Message, Opening

KEY = "rollout.environment.renderer"
_HELLO: Message = {"role": "user", "content": "1"}


class Dialogue(Protocol):
    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the policy's message, besides those that the server knows from the model."""
        ...

    def open(self, opening: Opening) -> list[int]:
        """Returns the ids [n] of the opening messages, after which the policy speaks."""
        ...

    def read(self, history: list[int], completion: list[int], opening: Opening) -> Message:
        """Returns what the policy said with `completion` after the ids `history`."""
        ...

    def answer(
        self, history: list[int], completion: list[int], messages: list[Message], opening: Opening
    ) -> list[int] | None:
        """Returns the ids to append, after which the policy speaks again; None if there are none: the template would
        change what is there."""
        ...


class PlainDialogue:
    """Text alone: nothing separates messages but the token that ended the policy's."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._format = ChatFormat(tokenizer, chat_template=False)

    def open(self, opening: Opening) -> list[int]:
        return self._format.encode(_text(opening.messages))

    def read(self, history: list[int], completion: list[int], opening: Opening) -> Message:
        return {"role": "assistant", "content": self._tokenizer.decode(completion, skip_special_tokens=True)}

    def answer(
        self, history: list[int], completion: list[int], messages: list[Message], opening: Opening
    ) -> list[int] | None:
        ids: list[int] = self._tokenizer.encode(_text(messages), add_special_tokens=False)
        return ids


class ChatDialogue:
    """The model's chat template, as the package `renderers` writes it."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Raises EnvError if there is no such renderer, the tokenizer lacks its tokens, or the template would change
        earlier messages when one is added."""
        self._renderer = _make_renderer(tokenizer, name)
        self._tokenizer = tokenizer
        self.stop_token_ids = tuple(self._renderer.get_stop_token_ids())
        self._check(name)

    def open(self, opening: Opening) -> list[int]:
        ids: list[int] = self._renderer.render_ids(
            opening.messages, tools=opening.tools or None, add_generation_prompt=True
        )
        return ids

    def read(self, history: list[int], completion: list[int], opening: Opening) -> Message:
        found = self._renderer.parse_response(completion, tools=opening.tools or None, prompt_ids=history)
        message: Message = {"role": "assistant", "content": found.content}
        if found.reasoning_content:
            message["reasoning_content"] = found.reasoning_content
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in found.tool_calls
            if call.status == "ok"
        ]
        return message | ({"tool_calls": calls} if calls else {})

    def answer(
        self, history: list[int], completion: list[int], messages: list[Message], opening: Opening
    ) -> list[int] | None:
        bridge = self._renderer.bridge_to_next_turn(history, completion, messages, tools=opening.tools or None)
        before = [*history, *completion]
        if bridge is None or list(bridge.token_ids[: len(before)]) != before:
            return None
        return list(bridge.token_ids[len(before) :])

    def _check(self, name: str) -> None:
        opening = Opening([_HELLO], [])
        history = self.open(opening)
        # Some prompts open the reasoning, which must then end; and some templates have an end for each next role.
        said = [self._tokenizer.encode(text, add_special_tokens=False) for text in ("1", "</think>1")]
        ended = [[*ids, stop] for ids in said for stop in self.stop_token_ids]
        for message in (_HELLO, {"role": "tool", "name": "tool", "content": "1"}):
            if all(self.answer(history, completion, [message], opening) is None for completion in ended):
                raise EnvError(
                    f"{KEY}: {name!r} cannot append a message of role {message['role']} to a conversation without "
                    "writing it anew, so that tokens would differ from those that were sampled; name the renderer of "
                    "the model's own template, or null for text alone"
                )


def make_dialogue(tokenizer: Any, renderer: str | None) -> Dialogue:
    """Raises EnvError as ChatDialogue does."""
    return PlainDialogue(tokenizer) if renderer is None else ChatDialogue(tokenizer, renderer)


def _make_renderer(tokenizer: Any, name: str) -> Any:
    try:
        from renderers import config_from_name, create_renderer
        from renderers.base import MODEL_RENDERER_MAP
    except ImportError as error:
        raise EnvError(
            f"{KEY}: {name!r} needs the package renderers ({error}): pip install 'megatron_rl[environments]'"
        ) from None
    logging.getLogger("renderers").setLevel(logging.WARNING)
    names = sorted({*MODEL_RENDERER_MAP.values()})
    if name not in names:
        raise EnvError(f"{KEY}: found {name!r}, expected one of {', '.join(names)}, or null for text alone")
    try:
        # "all": reasoning of earlier turns stays, although some templates drop it.
        return create_renderer(tokenizer, type(config_from_name(name))(thinking_retention="all"))
    except Exception as error:
        raise EnvError(
            f"{KEY}: {name!r} does not fit the tokenizer in model.path: {str(error)[:300] or type(error).__name__}"
        ) from None


def _text(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)
