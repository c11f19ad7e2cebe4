"""Rollouts on disk and between ranks: JSON lines, readable by people, exact to the last bit.

A float32 log-prob is written as the shortest decimal of its float64 value, which reads back to the same float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict, VersionSpan
from megatron_rl.errors import UserError

FORMAT = 1


class StoreError(UserError):
    """A rollout file that is not one; names file and line."""


def write_groups(path: Path, groups: Sequence[Group], *, weight_version: int) -> None:
    """A header line, then one group a line. The file appears whole or not at all."""
    header = {"format": FORMAT, "weight_version": weight_version, "groups": len(groups)}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        for record in (header, *map(_group_record, groups)):
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_groups(path: Path) -> list[Group]:
    """Raises StoreError naming the file and line, FileNotFoundError when there is none."""
    lines = path.read_bytes().splitlines()
    records = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    if not records or records[0].get("format") != FORMAT:
        raise StoreError(f"{path}:1: expected a header with format {FORMAT}; this is not a rollout file")
    if records[0]["groups"] != len(records) - 1:
        raise StoreError(f"{path}: the header says {records[0]['groups']} groups, {len(records) - 1} are there")
    groups = []
    for number, record in enumerate(records[1:], start=2):
        try:
            prompt = _prompt(record["prompt"])
            samples = tuple(_sample(prompt, s) for s in record["samples"])
            groups.append(Group(record["index"], prompt, samples))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path}:{number}: not a group: {type(error).__name__} {error}") from None
    return groups


def encode_samples(samples: Sequence[Sample]) -> bytes:
    """For other ranks of the trainer: no pickle."""
    records = [{"prompt": _prompt_record(s.prompt), **_sample_record(s)} for s in samples]
    return orjson.dumps(records, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_samples(data: bytes) -> list[Sample]:
    return [_sample(_prompt(record["prompt"]), record) for record in orjson.loads(data)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise StoreError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise StoreError(f"{path}:{number}: expected a JSON object")
    return record


def _group_record(group: Group) -> dict[str, Any]:
    return {
        "index": group.index,
        "prompt": _prompt_record(group.prompt),
        "samples": [_sample_record(s) for s in group.samples],
    }


def _prompt_record(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "text": prompt.text,
        "token_ids": list(prompt.token_ids),
        "answer": prompt.answer,
        "verifier": prompt.verifier,
    }


def _prompt(record: dict[str, Any]) -> Prompt:
    return Prompt(**{**record, "token_ids": tuple(record["token_ids"])})


def _sample_record(sample: Sample) -> dict[str, Any]:
    verdict = sample.verdict
    return {
        "sample": sample.index,
        "token_ids": sample.token_ids.tolist(),
        "loss_mask": sample.loss_mask.astype(int).tolist(),
        "rollout_logprobs": sample.rollout_logprobs.astype(float).tolist(),
        "versions": [[v.version, v.start, v.end] for v in sample.versions],
        "finish_reason": sample.finish_reason,
        "verdict": None if verdict is None else [verdict.reward, verdict.correct],
    }


def _sample(prompt: Prompt, record: dict[str, Any]) -> Sample:
    lengths = {len(record[k]) for k in ("token_ids", "loss_mask", "rollout_logprobs")}
    if len(lengths) != 1:
        raise ValueError(f"sample {record['sample']}: token_ids, loss_mask and rollout_logprobs differ in length")
    return Sample(
        prompt=prompt,
        index=record["sample"],
        token_ids=np.asarray(record["token_ids"], dtype=np.int32),
        loss_mask=np.asarray(record["loss_mask"], dtype=np.bool_),
        rollout_logprobs=np.asarray(record["rollout_logprobs"], dtype=np.float32),
        versions=tuple(VersionSpan(*v) for v in record["versions"]),
        finish_reason=record["finish_reason"],
        verdict=None if record["verdict"] is None else Verdict(*record["verdict"]),
    )
