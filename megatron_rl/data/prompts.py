"""Loads prompts and supervised examples from a data set or the arithmetic task, in an order that can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_rl.data import arithmetic_task, gym_task
from megatron_rl.data.arithmetic_task import ArithmeticTask
from megatron_rl.data.chat import ChatFormat, Tokenizer
from megatron_rl.data.files import DataError, find_files
from megatron_rl.data.generated import is_generated, task_of
from megatron_rl.data.gym_task import GymTask
from megatron_rl.data.records import Record, read_records
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.vocabulary import unknown_token


@dataclass(frozen=True)
class PromptCursor:
    """Position of a run in a data set: the epoch, and the number of prompts taken in it."""

    seed: int
    epoch: int = 0
    position: int = 0

    def as_json(self) -> dict[str, int]:
        """Fields for JSON; `PromptCursor(**cursor.as_json())` equals the cursor."""
        return asdict(self)


class PromptDataset:
    """Prompts in an order that the cursor's seed shuffles again in each epoch.

    A prompt is tokenized when it is taken: the token ids of a whole data set take ten times the memory of its text.
    """

    def __init__(self, prompts: Sequence[Prompt], encode: Callable[[str], list[int]]) -> None:
        """`prompts` are without token ids."""
        self._prompts = prompts
        self._encode = encode

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        prompt = self._prompts[index]
        return dataclasses.replace(prompt, token_ids=tuple(self._encode(prompt.text)))

    def take(self, cursor: PromptCursor, count: int) -> tuple[list[Prompt], PromptCursor]:
        """The next `count` prompts, into the next epoch if need be, and the cursor after them."""
        indexes, cursor = take_indexes(len(self), cursor, count)
        return [self[i] for i in indexes], cursor


def take_indexes(size: int, cursor: PromptCursor, count: int) -> tuple[list[int], PromptCursor]:
    """The next `count` indexes of a data set of `size` records, and the cursor after them.

    Raises DataError if the cursor does not fit the data set.
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
    """Names of a record's fields."""

    prompt: str
    answer: str  # the response, in a supervised example
    verifier: str | None = None  # for records without a field `verifier`; None: the source's default
    chat_template: bool = False


def load_sft_samples(
    source: str, fields: Fields, tokenizer: Tokenizer, max_tokens: int, *, vocab_size: int | None = None
) -> list[Sample]:
    """Samples of a prompt and its response; the loss mask covers the response and one end-of-sequence token.

    Raises DataError as load_prompts does.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token (eos_token); a response would never end")
    outside = None if vocab_size is None else unknown_token([tokenizer.eos_token_id], vocab_size)
    if outside:
        raise DataError(f"the tokenizer's end-of-sequence token (eos_token): {outside}")
    chat = ChatFormat(tokenizer, fields.chat_template, vocab_size)
    samples = []
    for record in source_records(source, fields, ("id",), answer_text=arithmetic_task.response_text):
        text = chat.text(record, fields.prompt)
        ids = chat.prompt_ids(record, fields.prompt, text)
        response = chat.response_ids(record, fields.answer)
        tokens = len(ids) + len(response)
        if tokens > max_tokens:
            raise record.error(
                f"{fields.prompt}, {fields.answer}",
                f"{len(ids)} + {len(response)} tokens, expected at most data.max_tokens = {max_tokens}",
            )
        prompt = Prompt(record.text("id", default=record.id), text, tuple(ids), answer="", verifier="")
        samples.append(Sample.start(prompt, 0).extend(response, [0.0] * len(response), weight_version=0))
    if not samples:
        raise DataError(f"{source}: no examples")
    return samples


def data_digest(source: str) -> str:
    """sha256 of the bytes of the source's files, or of a generated task with its defaults. Raises DataError.

    A resumed run compares it with the digest that the run began with.
    """
    if not is_generated(source):
        return f"sha256:{find_files(Path(source)).digest()}"
    return f"sha256:{hashlib.sha256(task_of(source).encode()).hexdigest()}"


def source_records(
    source: str, fields: Fields, optional: Sequence[str] | None, answer_text: Callable[[Sequence[int]], str]
) -> Iterator[Record]:
    """Records of a path that find_files accepts, or of a generated source.

    `answer_text` makes fields.answer from the terms of an arithmetic problem. `optional` names further fields to keep
    if a record has them; None keeps all.
    """
    if source.startswith(gym_task.PREFIX):
        for number, (question, answer) in enumerate(GymTask.parse(source).problems()):
            where = f"{source}:{number}"
            yield Record(where, where, {fields.prompt: question, fields.answer: answer})
        return
    if not is_generated(source):
        yield from read_records(Path(source), None if optional is None else {fields.prompt, fields.answer, *optional})
        return
    task = ArithmeticTask.parse(source)
    for number, terms in enumerate(task.problems()):
        values = {fields.prompt: arithmetic_task.prompt_text(terms), fields.answer: answer_text(terms)}
        where = f"{arithmetic_task.PREFIX}{task.split}:{number}"
        yield Record(where, where, values)
