"""Writes runs of one step with the values of its tokens, as lab.record_steps would."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import make_tokenizer

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import write_groups
from megatron_rl.lab.token_records import COLUMNS, token_file, write_tokens

STEP, GROUP_SIZE, PROMPT = 3, 2, "1+1="
LIVE = ("expert_change/old_policy/live", "expert_change/rollout_old/live")


def write_step(path: Path, responses: Sequence[str], *, verdicts: Sequence[Verdict] | None = None) -> list[Sample]:
    """Writes a run with the responses to one prompt, two by two; returns their samples."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path.parent / "tokenizer")
    path.mkdir(parents=True)
    path.joinpath("config.yaml").write_text(
        f"model: {{path: {path.parent / 'tokenizer'}}}\nrollout: {{group_size: {GROUP_SIZE}, replay_from: null}}\n"
    )
    samples = []
    for number, text in enumerate(responses):
        prompt = Prompt(f"p{number // 2}", PROMPT, tuple(tokenizer.encode(PROMPT)), "2", "arithmetic")
        ids = tokenizer.encode(text)
        sample = Sample.start(prompt, number % GROUP_SIZE).extend(ids, [-0.25] * len(ids), STEP - 1)
        verdict = verdicts[number] if verdicts else Verdict(1.0, True)
        samples.append(dataclasses.replace(sample, verdict=verdict, finish_reason="stop", response=text))
    groups = [
        Group(i, samples[2 * i].prompt, tuple(samples[2 * i : 2 * i + 2])) for i in range(len(samples) // GROUP_SIZE)
    ]
    write_groups(path / "rollouts" / f"step-{STEP:06d}-dp-0000.jsonl", groups, weight_version=STEP - 1)
    return samples


def columns_of(samples: Mapping[int, Sample], **values: Any) -> dict[str, np.ndarray]:
    """Columns of the numbered samples: zeros, or `values` by column."""
    first = {number: len(sample.prompt.token_ids) for number, sample in samples.items()}
    count = sum(sample.response_tokens for sample in samples.values())
    found = {name: np.zeros(count, dtype=kind.to_pandas_dtype()) for name, kind in COLUMNS.items()}
    found |= {name: np.zeros(count, dtype=np.float32) for name in LIVE}
    found["sample"] = np.concatenate([np.full(s.response_tokens, number) for number, s in samples.items()])
    found["position"] = np.concatenate([np.arange(first[n], len(s.token_ids)) for n, s in samples.items()])
    found["token_id"] = np.concatenate([s.response_ids for s in samples.values()])
    return found | {name: np.array(value, dtype=found[name].dtype) for name, value in values.items()}


def write_recorded(path: Path, columns: Mapping[str, np.ndarray], dp: int = 0, replicas: int = 1) -> None:
    order = np.random.default_rng(0).permutation(len(columns["sample"]))  # as mini-batches mix samples
    shuffled = {name: values[order] for name, values in columns.items()}
    write_tokens(token_file(path / "tokens", STEP, dp), shuffled, replicas=replicas)
