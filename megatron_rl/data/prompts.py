"""Prompts and supervised examples, from JSONL, a data set on disk, or the arithmetic task."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from megatron_rl.data.arithmetic import PREFIX, ArithmeticTask, prompt_text, response_text
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.errors import UserError


class DataError(UserError):
    """A data set or record that cannot be used; names file, line and field."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class PromptCursor:
    """Where a run stands in a data set: which epoch, and how many prompts of it have been taken."""

    seed: int
    epoch: int = 0
    position: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


class PromptDataset:
    """Prompts in an order that is shuffled anew each epoch, by the cursor's seed."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def take(self, cursor: PromptCursor, count: int) -> tuple[list[Prompt], PromptCursor]:
        """The next `count` prompts, over the ends of epochs, and the cursor after them."""
        indexes, cursor = take_indexes(len(self._prompts), cursor, count)
        return [self._prompts[i] for i in indexes], cursor


def take_indexes(size: int, cursor: PromptCursor, count: int) -> tuple[list[int], PromptCursor]:
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
    verifier: str = ""
    chat_template: bool = False


def load_prompts(source: str, fields: Fields, tokenizer: Tokenizer, max_tokens: int) -> PromptDataset:
    """Raises DataError naming file, line and field for a record that cannot be used, or a prompt over `max_tokens`."""
    prompts = []
    for where, record in _records(source, fields):
        text = _text(record, fields.prompt, where, chat=fields.chat_template)
        ids = _prompt_ids(text, tokenizer, fields.chat_template)
        if not 0 < len(ids) <= max_tokens:
            raise DataError(
                f"{where}: {fields.prompt}: {len(ids)} tokens; expected 1 to data.max_prompt_tokens {max_tokens}"
            )
        prompts.append(
            Prompt(
                id=str(record.get("id", where)),
                text=text if isinstance(text, str) else orjson.dumps(text).decode(),
                token_ids=tuple(ids),
                answer=str(_field(record, fields.answer, where)),
                verifier=str(record.get("verifier", fields.verifier)),
            )
        )
    if not prompts:
        raise DataError(f"{source}: no prompts")
    return PromptDataset(prompts)


def load_sft_samples(source: str, fields: Fields, tokenizer: Tokenizer, max_tokens: int) -> list[Sample]:
    """Each record's prompt, with its response and the end-of-sequence token in the loss mask. Raises DataError."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; a response would never end")
    samples = []
    for where, record in _records(source, fields):
        text = _text(record, fields.prompt, where, chat=fields.chat_template)
        ids = _prompt_ids(text, tokenizer, fields.chat_template)
        response = tokenizer.encode(str(_field(record, fields.answer, where)), add_special_tokens=False)
        response.append(tokenizer.eos_token_id)
        if not ids or len(ids) + len(response) > max_tokens:
            raise DataError(
                f"{where}: {len(ids) + len(response)} tokens; expected at most data.max_tokens {max_tokens}"
            )
        prompt = Prompt(where, "", tuple(ids), "", "")
        samples.append(Sample.start(prompt, 0).extend(response, [0.0] * len(response), weight_version=0))
    if not samples:
        raise DataError(f"{source}: no examples")
    return samples


def _prompt_ids(text: Any, tokenizer: Tokenizer, chat_template: bool) -> list[int]:
    if not chat_template:
        return tokenizer.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def _records(source: str, fields: Fields) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, record)."""
    if source.startswith(PREFIX):
        task = ArithmeticTask.parse(source)
        for number, terms in enumerate(task.problems()):
            answer, response = str(sum(terms)), response_text(terms)
            names = {fields.prompt: prompt_text(terms), "answer": answer, "response": response}
            yield f"{PREFIX}{task.split}:{number}", names
        return
    path = Path(source)
    if path.is_dir():
        yield from _data_set(path)
    elif path.is_file():
        yield from _json_lines(path)
    else:
        raise DataError(f"{source}: no such file or directory; expected JSONL, a data set directory or {PREFIX}...")


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: expected an object, found {type(record).__name__}")
            yield where, record


def _data_set(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            files = sorted(str(f) for f in path.glob("*.parquet"))
            loaded = datasets.load_dataset("parquet", data_files=files, split="train") if files else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a data set: {error}") from None
    if loaded is None or isinstance(loaded, datasets.DatasetDict):
        splits = f"; name one of its splits: {', '.join(loaded)}" if loaded else ""
        raise DataError(f"{path}: expected one split of a saved data set, or parquet files{splits}")
    for number, record in enumerate(loaded):
        yield f"{path.name}:{number}", record


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    if record.get(name) is None:
        close = difflib.get_close_matches(name, record, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(record))}"
        raise DataError(f"{where}: no field {name!r}{hint}")
    return record[name]


def _text(record: Mapping[str, Any], name: str, where: str, chat: bool) -> Any:
    value = _field(record, name, where)
    if isinstance(value, str) or (chat and isinstance(value, list)):
        return value
    expected = "text or a list of messages" if chat else "text (messages need data.chat_template: true)"
    raise DataError(f"{where}: {name}: expected {expected}, found {type(value).__name__}")
