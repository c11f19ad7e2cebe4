"""Reads one step of a run for `megatron-rl inspect`: its saved rollouts, and the values of its tokens if recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.sample import Sample
from megatron_rl.data.store import read_groups
from megatron_rl.errors import MissingFileError
from megatron_rl.lab.token_records import POSITION, SAMPLE, TokenFileError, read_tokens
from megatron_rl.models.check import load_tokenizer
from megatron_rl.report.loaded_runs import LoadedRun, ReportError, load_run


@dataclass(frozen=True, eq=False)
class InspectedResponse:
    number: int
    """group * rollout.group_size + number in the group."""
    sample: Sample
    texts: Sequence[str]
    """[n] text of each token of the response."""
    columns: Mapping[str, np.ndarray]
    """[n] as in lab/token_records.py; NaN for a token that was not trained on."""

    @property
    def is_recorded(self) -> bool:
        """Whether a token of it was trained on in a recorded step."""
        return "logprob" in self.columns and bool(np.isfinite(self.columns["logprob"]).any())


@dataclass(frozen=True)
class InspectedStep:
    run: str
    step: int
    responses: Sequence[InspectedResponse]
    is_recorded: bool

    def column(self, name: str) -> np.ndarray | None:
        """The column over all responses; None if the step does not have it."""
        parts = [each.columns[name] for each in self.responses if name in each.columns]
        return np.concatenate(parts) if parts else None


def load_step(path: Path, step: int, model: Path | None) -> InspectedStep:
    """Reads a step; `model` holds the tokenizer, and defaults to the run's model.path.

    Raises MissingFileError if the run or the step's rollouts are not there, and StoreError, TokenFileError or
    ReportError if a file is damaged or the files do not belong together.
    """
    run = load_run(path)
    files = _rollout_files(run, step)
    groups = [group for file in files for group in read_groups(file)]
    size = _group_size(run)
    samples = {group.index * size + sample.index: sample for group in groups for sample in group.samples}
    if len(samples) != sum(len(group.samples) for group in groups):
        raise ReportError(f"{files[0]} and the step's other files: a group is there twice, or exceeds its size {size}")
    tokens = sorted((run.path / "tokens").glob(f"step-{step:06d}-dp-*.parquet"))
    recorded = _by_sample(tokens, samples) if tokens else {}
    names = _Texts(_tokenizer(run, model))
    responses = [
        InspectedResponse(number, sample, names.of(sample), _columns(sample, recorded.get(number), bool(tokens)))
        for number, sample in sorted(samples.items())
    ]
    return InspectedStep(run.name, step, responses, is_recorded=bool(tokens))


def _rollout_files(run: LoadedRun, step: int) -> list[Path]:
    source = run.config.get("rollout.replay_from", "null")
    directory = (run.path if source in ("null", "", "~") else Path(source)) / "rollouts"
    pattern = "step-{}-dp-*.jsonl"
    files = sorted(directory.glob(pattern.format(f"{step:06d}")))
    if files:
        return files
    steps = sorted({int(file.name.split("-")[1]) for file in directory.glob(pattern.format("*"))})
    has = f"it has those of steps {steps[0]} to {steps[-1]}" if steps else "it has none"
    raise MissingFileError(f"{directory}: no rollouts of step {step}; {has}. Name another --step.")


def _group_size(run: LoadedRun) -> int:
    try:
        return int(run.config["rollout.group_size"])
    except (KeyError, ValueError):
        raise ReportError(
            f"{run.path / 'config.yaml'}: has no rollout.group_size; `inspect` reads runs of `megatron-rl train`"
        ) from None


def _tokenizer(run: LoadedRun, model: Path | None) -> Any:
    directory = model or Path(run.config.get("model.path", run.path / "model"))
    if not directory.is_dir():
        raise MissingFileError(
            f"{directory}: the model whose tokenizer the run used is not there. Name it, or a copy, with --model."
        )
    return load_tokenizer(directory)


class _Texts:
    """Texts of token ids, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, sample: Sample) -> list[str]:
        return [self._known.get(i) or self._look_up(i) for i in sample.response_ids.tolist()]

    def _look_up(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:  # an id of the model's vocabulary that the tokenizer does not have
            text = f"<{token}>"
        elif "\ufffd" in text:  # a part of a character
            text = str(raw)
        elif str(raw).startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops the first space
            text = " " + text
        self._known[token] = text
        return text


def _by_sample(files: Sequence[Path], samples: Mapping[int, Sample]) -> dict[int, dict[str, np.ndarray]]:
    """The recorded columns of each sample. Raises TokenFileError if they are not of these samples."""
    columns = read_tokens(files)
    order = np.lexsort((columns[POSITION], columns[SAMPLE]))
    columns = {name: values[order] for name, values in columns.items()}
    numbers, starts = np.unique(columns[SAMPLE], return_index=True)
    found = {}
    for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(order)], strict=True):
        part = {name: values[start:end] for name, values in columns.items()}
        sample, at = samples.get(number), part[POSITION]
        if sample is None or at.max() >= len(sample.token_ids) or (sample.token_ids[at] != part["token_id"]).any():
            raise TokenFileError(
                f"{files[0]}: sample {number} is not the one of the step's rollouts; the files are of different runs. "
                "Remove it."
            )
        found[number] = part
    return found


def _columns(sample: Sample, part: Mapping[str, np.ndarray] | None, is_recorded: bool) -> dict[str, np.ndarray]:
    first = len(sample.prompt.token_ids)
    spread = {"rollout_logprob": np.where(sample.loss_mask, sample.rollout_logprobs, np.nan)[first:]}
    if not is_recorded:
        return spread
    recorded = {} if part is None else {name: values for name, values in part.items() if name not in (SAMPLE, POSITION)}
    for name in recorded or ("logprob",):
        whole = np.full(len(sample.token_ids), np.nan)
        if part is not None:
            whole[part[POSITION]] = part[name]
        if name not in spread:
            spread[name] = whole[first:]
    return spread
