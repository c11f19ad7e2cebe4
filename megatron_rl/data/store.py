"""Stores rollouts on disk and sends them between ranks, exact to the last bit and never pickled.

On disk rollouts are JSON lines that people can read, except the routing traces and the top tokens. A float32 log-prob
is written as the shortest decimal of its float64 value, which reads back to the same float32. The text of a response is
for people; the token ids are trained on.

Each line ends with its `checksum`: BLAKE2b, 16 bytes in hex, of the previous line's checksum and of this line up to
`,"checksum"`. So a line that was changed, moved, repeated or left out is refused.

Between ranks samples are safetensors, at nine bytes per token.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import orjson
import safetensors.numpy
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from megatron_rl.data.sample import FinishReason, Group, Prompt, Sample, Verdict
from megatron_rl.data.top_tokens import TopTokens, TopTokensError
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.errors import UserError

LOWEST = float(np.finfo(np.float32).min)
PROBE_BYTES = 1 << 16
PAYS = 0.8
"""A trace is compressed if its first PROBE_BYTES shrink to less than this share: up to about 64 experts."""

TRACE_BYTES, TRACE_BYTES_PER_TOKEN = 1 << 20, 1 << 15
"""Bound of a trace: about 256 MoE layers with 64 experts per token, two bytes each."""

_SEAL = re.compile(rb'(.*),"checksum":"([0-9a-f]{32})"\}\n', re.DOTALL)

_Count = Annotated[int, Field(ge=0, le=2**53)]
_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class StoreError(UserError):
    """A rollout file cannot be read. Names the file, the line and the field."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Header(_Record):
    """Facts in a file about the run that wrote it."""

    format: Literal[2]
    weight_version: _Count
    groups: _Count
    temperature: float | None = None
    """Temperature of the log-probs; None if unknown."""
    vocab_size: _Count | None = None
    """Vocabulary size of the model that sampled; None if unknown."""
    files: Annotated[int, Field(ge=1)] | None = None
    """Files of the step, this one included: one of each data-parallel replica; None if unknown."""


class _PromptRecord(_Record):
    id: str
    text: str
    token_ids: list[_TokenId]
    answer: str
    verifier: str


def _write_binary(data: bytes) -> str:
    """base64 of the bytes, after `raw:` or `zlib:`."""
    probe = data[:PROBE_BYTES]
    if len(zlib.compress(probe, level=1)) < PAYS * len(probe):
        return "zlib:" + base64.b64encode(zlib.compress(data, level=1)).decode()
    return "raw:" + base64.b64encode(data).decode()


def _read_trace(written: object, info: ValidationInfo) -> object:
    """Reads a trace; raises ValueError. A value that is not text is returned for pydantic to refuse."""
    return RoutingTrace.from_bytes(_read_binary(written, info)) if isinstance(written, str) else written


def _read_top_tokens(written: object, info: ValidationInfo) -> object:
    """As _read_trace."""
    return TopTokens.from_bytes(_read_binary(written, info)) if isinstance(written, str) else written


def _read_binary(written: str, info: ValidationInfo) -> bytes:
    """Reads what _write_binary wrote; raises ValueError."""
    form, _, text = written.partition(":")
    if form not in ("raw", "zlib"):
        raise ValueError(f"found {written!r:.20}; expected raw:... or zlib:...")
    try:
        data = base64.b64decode(text, validate=True)
        return _decompress(data, len(info.data.get("token_ids", ()))) if form == "zlib" else data
    except (ValueError, zlib.error) as error:
        raise ValueError(f"found text that is no {form} data ({error})") from None


def _decompress(data: bytes, tokens: int) -> bytes:
    """Decompresses what belongs to that many tokens; raises ValueError as soon as it exceeds the largest trace."""
    most = TRACE_BYTES + TRACE_BYTES_PER_TOKEN * tokens
    stream = zlib.decompressobj()
    found = stream.decompress(data, most + 1)
    if len(found) > most:
        raise ValueError(f"it grows beyond {most} bytes, too many for {tokens} tokens")
    if not stream.eof:
        raise ValueError("it is cut off")
    return found


class _SampleRecord(_Record):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    sample: _Count
    token_ids: list[_TokenId]
    loss_mask: list[Literal[0, 1]]
    rollout_logprobs: list[Annotated[float, Field(le=0, ge=LOWEST)]]  # finite as float32
    versions: list[tuple[_Count, _Count, _Count]]  # version, start, end
    finish_reason: FinishReason | None
    verdict: tuple[float, bool] | tuple[float, bool, Literal["lost"]] | None  # reward, correct
    response: str | None = None  # for people; token_ids are trained on
    trace: Annotated[RoutingTrace | None, BeforeValidator(_read_trace)] = None
    top_tokens: Annotated[TopTokens | None, BeforeValidator(_read_top_tokens)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> _SampleRecord:
        lengths = [len(values) for values in (self.token_ids, self.loss_mask, self.rollout_logprobs)]
        if len(set(lengths)) > 1:
            raise ValueError("{} token_ids, {} loss_mask and {} rollout_logprobs".format(*lengths))
        if self.trace is not None and self.trace.rows > lengths[0]:
            raise ValueError(f"trace: {self.trace.rows} rows for {lengths[0]} tokens")
        return self


class _GroupRecord(_Record):
    index: _Count
    prompt: _PromptRecord
    samples: list[_SampleRecord]

    @model_validator(mode="after")
    def _responses_follow_the_prompt(self) -> _GroupRecord:
        n = len(self.prompt.token_ids)
        for sample in self.samples:
            if sample.token_ids[:n] != self.prompt.token_ids or any(sample.loss_mask[:n]):
                raise ValueError(f"sample {sample.sample}: does not begin with its prompt, outside the loss mask")
            if sample.top_tokens is not None:
                _check_top_tokens(sample, n)
            ends = [n, *(end for _, _, end in sample.versions)]
            starts = [start for _, start, _ in sample.versions]
            if starts != ends[:-1] or ends != sorted(ends) or ends[-1] != len(sample.token_ids):
                raise ValueError(
                    f"sample {sample.sample}: versions: the spans do not follow on one another from the prompt's {n} "
                    f"tokens to all {len(sample.token_ids)}"
                )
        numbers = [sample.sample for sample in self.samples]
        if numbers != list(range(len(numbers))):
            raise ValueError(f"samples: found numbers {numbers}; expected 0 to {len(numbers) - 1} in order")
        return self


def _check_top_tokens(sample: _SampleRecord, prompt: int) -> None:
    try:
        sample.top_tokens.check_sampled(sample.token_ids[prompt:], sample.rollout_logprobs[prompt:])  # type: ignore[union-attr]
    except TopTokensError as error:
        raise ValueError(f"sample {sample.sample}: top_tokens: {error}") from None


def write_groups(
    path: Path,
    groups: Sequence[Group],
    *,
    weight_version: int,
    temperature: float | None = None,
    vocab_size: int | None = None,
    files: int | None = None,
) -> None:
    """Writes a header line, then one group per line. The file appears whole or not at all."""
    header = Header(
        format=2,
        weight_version=weight_version,
        groups=len(groups),
        temperature=temperature,
        vocab_size=vocab_size,
        files=files,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        checksum = _write_line(file, header.model_dump(exclude_none=True), b"")
        for group in groups:
            checksum = _write_line(file, _group_record(group), checksum)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_groups(path: Path) -> list[Group]:
    """Raises StoreError, which names file, line and field, and FileNotFoundError if there is no file."""
    groups = []
    with path.open("rb") as file:
        header, checksum = _read_header(path, file)
        for number, line in enumerate(file, start=2):
            body, checksum = _unsealed(path, number, line, checksum)
            record = _parse(_GroupRecord, path, number, body)
            prompt = _prompt(record.prompt.model_dump())
            groups.append(Group(record.index, prompt, tuple(_read_sample(prompt, s) for s in record.samples)))
    if len(groups) != header.groups:
        raise StoreError(f"{path}: the header says {header.groups} groups, {len(groups)} are there; it is cut off")
    return groups


def read_header(path: Path) -> Header:
    """Reads the first line only. Raises as read_groups does."""
    with path.open("rb") as file:
        return _read_header(path, file)[0]


def encode_samples(samples: Sequence[Sample]) -> bytes:
    """Encodes samples for other ranks of the trainer; `decode_samples` reverses it.

    Routing traces and top tokens are left out. They are many times as large, so a rank gets only what it needs of them
    (routing/exchange.py, engine/top_exchange.py).
    """

    def column(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *arrays])

    records = [{"prompt": _prompt_record(s.prompt), "tokens": len(s.token_ids), **_sample_record(s)} for s in samples]
    return safetensors.numpy.save(
        {
            "records": np.frombuffer(orjson.dumps(records), dtype=np.uint8),
            "token_ids": column([s.token_ids for s in samples], np.int32),
            "loss_mask": column([s.loss_mask for s in samples], np.bool_),
            "rollout_logprobs": column([s.rollout_logprobs for s in samples], np.float32),
        }
    )


def decode_samples(data: bytes) -> list[Sample]:
    columns = safetensors.numpy.load(data)
    records = orjson.loads(columns.pop("records").tobytes())
    ends = np.cumsum([record["tokens"] for record in records], dtype=np.int64)
    parts = {name: np.split(column, ends[:-1]) for name, column in columns.items()}
    return [
        _sample(_prompt(record["prompt"]), record, **{name: split[i] for name, split in parts.items()})
        for i, record in enumerate(records)
    ]


def _checksum(before: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(before + body, digest_size=16).hexdigest().encode()


def _write_line(file: BinaryIO, record: dict[str, Any], before: bytes) -> bytes:
    """Writes a line and returns its checksum; `before` is the checksum of the previous line."""
    body = orjson.dumps(record)[:-1]
    checksum = _checksum(before, body)
    file.write(body + b',"checksum":"' + checksum + b'"}\n')
    return checksum


def _unsealed(path: Path, number: int, line: bytes, before: bytes) -> tuple[bytes, bytes]:
    """The record without its checksum, and the checksum. Raises StoreError."""
    found = _SEAL.fullmatch(line)
    if found is None:
        raise StoreError(f"{path}:{number}: the line does not end in its checksum; it is cut off, or was changed")
    body, checksum = found.groups()
    if checksum != _checksum(before, body):
        raise StoreError(
            f"{path}:{number}: the checksum {checksum.decode()} does not match: this line or an earlier one was "
            "changed, moved or left out; saved rollouts cannot be edited, only sampled again"
        )
    return body + b"}", checksum


def _read_header(path: Path, file: BinaryIO) -> tuple[Header, bytes]:
    line = file.readline()
    if line.startswith(b'{"format":1,'):
        raise StoreError(
            f"{path}:1: not the header of a rollout file of format 2: found format 1, whose lines have no "
            "checksums; sample the rollouts again"
        )
    body, checksum = _unsealed(path, 1, line, b"")
    return _parse(Header, path, 1, body), checksum


def _parse(kind: type[Any], path: Path, number: int, line: bytes) -> Any:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        expected = "not the header of a rollout file" if number == 1 else "not a group"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise StoreError(f"{path}:{number}: {expected}: {field + ': ' if field else ''}{first['msg']}{more}") from None


def _group_record(group: Group) -> dict[str, Any]:
    samples = []
    for sample in group.samples:
        text = {} if sample.response is None else {"response": sample.response}
        trace = {} if sample.trace is None else {"trace": _write_binary(sample.trace.to_bytes())}
        if sample.top_tokens is not None:
            trace["top_tokens"] = _write_binary(sample.top_tokens.to_bytes())
        columns = {
            "token_ids": sample.token_ids.tolist(),
            "loss_mask": sample.loss_mask.astype(int).tolist(),
            "rollout_logprobs": sample.rollout_logprobs.astype(float).tolist(),
        }
        samples.append({**_sample_record(sample), **text, **columns, **trace})
    return {"index": group.index, "prompt": _prompt_record(group.prompt), "samples": samples}


def _prompt_record(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "text": prompt.text,
        "token_ids": prompt.token_ids,
        "answer": prompt.answer,
        "verifier": prompt.verifier,
    }


def _prompt(record: dict[str, Any]) -> Prompt:
    return Prompt(**{**record, "token_ids": tuple(record["token_ids"])})


def _sample_record(sample: Sample) -> dict[str, Any]:
    """The sample's fields, without the arrays and the trace."""
    verdict = sample.verdict
    return {
        "sample": sample.index,
        "versions": [[v.version, v.start, v.end] for v in sample.versions],
        "finish_reason": sample.finish_reason,
        "verdict": None if verdict is None else [verdict.reward, verdict.correct, *(["lost"] if verdict.lost else [])],
    }


def _sample(prompt: Prompt, record: dict[str, Any], **columns: Any) -> Sample:
    return Sample(
        prompt=prompt,
        index=record["sample"],
        versions=tuple(VersionSpan(*v) for v in record["versions"]),
        finish_reason=record["finish_reason"],
        verdict=None if record["verdict"] is None else _verdict(*record["verdict"]),
        **columns,
    )


def _verdict(reward: float, correct: bool, lost: str | None = None) -> Verdict:
    return Verdict(reward, correct, lost is not None)


def _read_sample(prompt: Prompt, record: _SampleRecord) -> Sample:
    return _sample(
        prompt,
        record.model_dump(include={"sample", "versions", "finish_reason", "verdict"}),
        response=record.response,
        token_ids=np.asarray(record.token_ids, dtype=np.int32),
        loss_mask=np.asarray(record.loss_mask, dtype=np.bool_),
        rollout_logprobs=np.asarray(record.rollout_logprobs, dtype=np.float32),
        trace=record.trace,
        top_tokens=record.top_tokens,
    )
