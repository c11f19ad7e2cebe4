"""Turns prompts and responses into token ids, with the tokenizer's special tokens and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jinja2

from megatron_rl.data.files import DataError
from megatron_rl.data.records import Record, kind_of
from megatron_rl.data.vocabulary import unknown_token


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this project uses."""

    @property
    def bos_token_id(self) -> Any: ...

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def unk_token_id(self) -> Any: ...

    @property
    def chat_template(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...


class ChatFormat:
    """Encodes a prompt as plain text, or as messages in the tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer, chat_template: bool, vocab_size: int | None = None) -> None:
        """`vocab_size` is the number of rows of the model's embedding; None leaves ids unchecked.

        Raises DataError if a chat template is asked for and the tokenizer has none, or more than one.
        """
        template = tokenizer.chat_template
        if chat_template and not template:
            raise DataError("data.chat_template: true, but the model's tokenizer has no chat template")
        if chat_template and isinstance(template, Mapping) and "default" not in template:
            raise DataError(
                f"data.chat_template: true, but none of the tokenizer's chat templates ({', '.join(sorted(template))}) "
                "is called 'default'; give the one to use that name in the model's directory"
            )
        self._tokenizer = tokenizer
        self._chat = chat_template
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids [n] of a rendered prompt. A chat template writes the tokenizer's special tokens itself.

        Drops an end-of-sequence token that the tokenizer appends, because the response continues the prompt. Drops a
        beginning-of-sequence token if the text already has one, as the text of a chat template may.
        """
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if self._chat:
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        if ids and ids[-1] == eos and not self._ends_with_eos(text):
            ids = ids[:-1]
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def text(self, record: Record, name: str) -> str:
        """The field as rendered text. Raises DataError if it is blank or not a prompt."""
        value = record.field(name)
        if isinstance(value, str):
            last = value
        elif not self._chat:
            hint = "; messages need data.chat_template: true" if isinstance(value, list) else ""
            raise record.error(name, f"expected text, found {kind_of(value)}{hint}")
        elif isinstance(value, list) and value and all(map(_is_message, value)):
            last = value[-1]["content"]
        else:
            raise record.error(name, "expected text or a list of messages, each with role and content as text")
        if not last.strip():
            raise record.error(name, "is empty; expected a prompt")
        return self._render(record, name, value) if self._chat else value

    def prompt_ids(self, record: Record, name: str, text: str) -> list[int]:
        """Token ids [n] of the rendered `text`.

        Raises DataError if the prompt has no tokens, ends with an end-of-sequence token, or has characters or tokens
        that the tokenizer or the model does not know.
        """
        ids = self._known(record, name, lambda: self.encode(text))
        eos = self._tokenizer.eos_token_id
        if not ids or set(ids) == {self._tokenizer.bos_token_id}:
            raise record.error(name, "the tokenizer makes no tokens of it; expected a prompt")
        if ids[-1] == eos:
            cause = "the chat template" if self._chat else "the text"
            raise record.error(
                name,
                f"{cause} ends it with the end-of-sequence token, id {eos}, so that nothing can follow; take the token "
                "off, or use a chat template that opens the response (add_generation_prompt)",
            )
        return ids

    def response_ids(self, record: Record, name: str) -> list[int]:
        """Token ids [n] of the field as a response, with one end-of-sequence token at its end.

        Raises DataError if the response is empty, or has an end-of-sequence token before its end.
        """
        text = record.text(name)
        ids = self._known(record, name, lambda: self._tokenizer.encode(text, add_special_tokens=False))
        eos = self._tokenizer.eos_token_id
        ids = ids[:-1] if ids and ids[-1] == eos else ids
        if not ids or not text.strip():
            raise record.error(name, "is empty; expected a response")
        if eos in ids:
            raise record.error(name, f"has the end-of-sequence token, id {eos}, before its end; a response ends there")
        return [*ids, eos]

    def _ends_with_eos(self, text: str) -> bool:
        return self._tokenizer.encode(text, add_special_tokens=False)[-1:] == [self._tokenizer.eos_token_id]

    def _render(self, record: Record, name: str, value: str | list[Any]) -> str:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the tokenizer's chat template is no template: line {error.lineno}: {str(error)[:200]}"
            ) from None
        except Exception as error:  # a template is a program, which may raise anything
            raise record.error(name, f"the chat template refuses it: {error or type(error).__name__}") from None

    def _known(self, record: Record, name: str, encode: Any) -> list[int]:
        """Raises DataError for characters without a token, and for tokens that the model lacks.

        A tokenizer of bytes knows all characters. Some must still name an unknown token, and reuse the token that
        begins or ends a text; such a token is no sign of an unknown character.
        """
        try:
            ids = encode()
        except Exception as error:  # the tokenizers library has no exception type of its own
            raise record.error(name, f"the tokenizer refuses it: {str(error)[:200]}") from None
        unknown = self._tokenizer.unk_token_id
        if unknown in ids and unknown not in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            raise record.error(name, "has characters that the model's tokenizer does not know")
        outside = None
        if self._vocab_size is not None:
            outside = unknown_token(ids, self._vocab_size, self._tokenizer.convert_ids_to_tokens)
        if outside:
            raise record.error(
                name, f"{outside}; the tokenizer in model.path has more tokens than the model's embedding"
            )
        return ids


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
