"""Prompts and supervised examples, from a data set on disk or the arithmetic task, in an order that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_rl.data import arithmetic
from megatron_rl.data.arithmetic import ArithmeticTask
from megatron_rl.data.records import DataError, Record, read_records
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.vocabulary import unknown_token


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

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


@dataclass(frozen=True)
class PromptCursor:
    """Where a run stands in a data set: which epoch, and how many prompts of it have been taken."""

    seed: int
    epoch: int = 0
    position: int = 0

    def as_json(self) -> dict[str, int]:
        """`PromptCursor(**cursor.as_json())` is the same cursor."""
        return asdict(self)


class PromptDataset:
    """Prompts in an order that is shuffled anew each epoch, by the cursor's seed.

    Token ids are made when a prompt is taken: kept for a whole data set, they would be ten times its text.
    """

    def __init__(self, prompts: Sequence[Prompt], encode: Callable[[str], list[int]]) -> None:
        """`prompts` without their token ids."""
        self._prompts = prompts
        self._encode = encode

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        prompt = self._prompts[index]
        return dataclasses.replace(prompt, token_ids=tuple(self._encode(prompt.text)))

    @property
    def verifiers(self) -> frozenset[str]:
        """All that the prompts name, so that a misspelt one is found before the first rollout."""
        return frozenset(prompt.verifier for prompt in self._prompts)

    def take(self, cursor: PromptCursor, count: int) -> tuple[list[Prompt], PromptCursor]:
        """The next `count` prompts, over the ends of epochs, and the cursor after them."""
        indexes, cursor = take_indexes(len(self), cursor, count)
        return [self[i] for i in indexes], cursor


def take_indexes(size: int, cursor: PromptCursor, count: int) -> tuple[list[int], PromptCursor]:
    """The next `count` indexes of a data set of `size`, and the cursor after them.

    Raises DataError for a cursor that does not fit the data set.
    """
    if not 0 <= cursor.position < size:
        raise DataError(
            f"the run has taken {cursor.position} prompts of this epoch, but the data set has {size}; "
            "it is not the one that the run began with"
        )
    epoch, position = cursor.epoch, cursor.position
    taken: list[int] = []
    while len(taken) < count:
        order = np.random.default_rng([cursor.seed, epoch]).permutation(size)
        part = order[position : position + count - len(taken)].tolist()
        taken += part
        position += len(part)
        if position == size:
            epoch, position = epoch + 1, 0
    return taken, PromptCursor(cursor.seed, epoch, position)


@dataclass(frozen=True)
class Fields:
    """Where in a record things are."""

    prompt: str
    answer: str  # or the response, of a supervised example
    verifier: str | None = None  # of a record without a field of that name; None: what suits the source
    chat_template: bool = False


def load_prompts(
    source: str, fields: Fields, tokenizer: Tokenizer, max_tokens: int, *, vocab_size: int | None = None
) -> PromptDataset:
    """Reads and checks all of `source`: what read_records takes, or `arithmetic:SPEC`.

    A record may carry its own id (else file name and line) and verifier. Raises DataError naming file, line and
    field for a record that cannot be used, an id given twice, a prompt over `max_tokens`, or a token that the model's
    vocabulary of `vocab_size` lacks; None leaves that unchecked.
    """
    chat = ChatFormat(tokenizer, fields.chat_template)
    verifier = fields.verifier or ("arithmetic" if source.startswith(arithmetic.PREFIX) else "math")
    prompts = []
    where: dict[str, str] = {}
    for record in _records(source, fields, answer_text=lambda terms: str(sum(terms))):
        text = chat.text(record, fields.prompt)
        ids = chat.encode(text)
        if not 0 < len(ids) <= max_tokens:
            raise record.error(
                fields.prompt, f"prompt has {len(ids)} tokens, expected 1 to data.max_prompt_tokens = {max_tokens}"
            )
        _check_known(ids, tokenizer, record, fields.prompt, vocab_size)
        prompt = Prompt(
            id=record.text("id", default=record.id),
            text=text,
            token_ids=(),
            answer=record.text(fields.answer),
            verifier=record.text("verifier", default=verifier),
        )
        if prompt.id in where:
            raise record.error("id", f"{prompt.id!r} is also at {where[prompt.id]}; ids must differ")
        where[prompt.id] = record.where
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{source}: no prompts")
    return PromptDataset(prompts, chat.encode)


def load_sft_samples(
    source: str, fields: Fields, tokenizer: Tokenizer, max_tokens: int, *, vocab_size: int | None = None
) -> list[Sample]:
    """Each record's prompt, with its response and the end-of-sequence token in the loss mask. Raises DataError as
    load_prompts does."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token (eos_token); a response would never end")
    outside = None if vocab_size is None else unknown_token([tokenizer.eos_token_id], vocab_size)
    if outside:
        raise DataError(f"the tokenizer's end-of-sequence token (eos_token): {outside}")
    chat = ChatFormat(tokenizer, fields.chat_template)
    samples = []
    for record in _records(source, fields, answer_text=arithmetic.response_text):
        text = chat.text(record, fields.prompt)
        ids = chat.encode(text)
        response = tokenizer.encode(record.text(fields.answer), add_special_tokens=False)
        _check_known(ids, tokenizer, record, fields.prompt, vocab_size)
        _check_known(response, tokenizer, record, fields.answer, vocab_size)
        response.append(tokenizer.eos_token_id)
        tokens = len(ids) + len(response)
        if not ids or tokens > max_tokens:
            raise record.error(
                f"{fields.prompt}, {fields.answer}",
                f"{len(ids)} + {len(response)} tokens, expected a prompt, and at most data.max_tokens = {max_tokens}",
            )
        prompt = Prompt(record.text("id", default=record.id), text, tuple(ids), answer="", verifier="")
        samples.append(Sample.start(prompt, 0).extend(response, [0.0] * len(response), weight_version=0))
    if not samples:
        raise DataError(f"{source}: no examples")
    return samples


class ChatFormat:
    """A prompt as the model reads it: as it stands, or as messages in the tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer, chat_template: bool) -> None:
        if chat_template and not tokenizer.chat_template:
            raise DataError("data.chat_template: true, but the model's tokenizer has no chat template")
        self._tokenizer = tokenizer
        self._chat = chat_template

    def encode(self, text: str) -> list[int]:
        """Of a rendered prompt: a chat template writes the tokenizer's special tokens itself."""
        return self._tokenizer.encode(text, add_special_tokens=not self._chat)

    def text(self, record: Record, name: str) -> str:
        value = record.field(name)
        if not self._chat:
            if isinstance(value, str):
                return value
            hint = "; messages need data.chat_template: true" if isinstance(value, list) else ""
            raise record.error(name, f"expected text, found {type(value).__name__}{hint}")
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise record.error(name, "expected text or a list of messages, each with role and content as text")
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _check_known(ids: list[int], tokenizer: Tokenizer, record: Record, name: str, vocab_size: int | None) -> None:
    """Refuses tokens that the model lacks, and characters that the tokenizer has no token for. One that works on bytes
    knows them all, and may name the token for the unknown only because it has to: one that also begins or ends a text.
    """
    unknown = tokenizer.unk_token_id
    if unknown in ids and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise record.error(name, "has characters that the model's tokenizer does not know")
    outside = None if vocab_size is None else unknown_token(ids, vocab_size, tokenizer.convert_ids_to_tokens)
    if outside:
        raise record.error(name, f"{outside}; the tokenizer in model.path has more tokens than the model's embedding")


def _records(source: str, fields: Fields, answer_text: Callable[[Sequence[int]], str]) -> Iterator[Record]:
    """`answer_text` gives what stands in fields.answer for the terms of an arithmetic problem."""
    if not source.startswith(arithmetic.PREFIX):
        yield from read_records(Path(source))
        return
    task = ArithmeticTask.parse(source)
    for number, terms in enumerate(task.problems()):
        values = {fields.prompt: arithmetic.prompt_text(terms), fields.answer: answer_text(terms)}
        where = f"{arithmetic.PREFIX}{task.split}:{number}"
        yield Record(where, where, values)
