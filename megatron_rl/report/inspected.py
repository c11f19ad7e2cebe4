"""Reads one step of a run for `megatron-rl inspect`: its saved rollouts, and the values of its tokens if recorded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.sample import Sample
from megatron_rl.data.step_files import rollout_files, steps_of
from megatron_rl.data.store import read_groups
from megatron_rl.errors import MissingFileError
from megatron_rl.lab.token_records import POSITION, SAMPLE, TokenFileError, read_tokens
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.report.loaded_runs import LoadedRun, ReportError, load_run


@dataclass(frozen=True, eq=False)
class InspectedResponse:
    number: int
    """group * rollout.group_size + number in the group."""
    sample: Sample
    texts: Sequence[str]
    """[n] text of each token of the response; [] without a tokenizer."""
    columns: Mapping[str, np.ndarray]
    """[n] as in lab/token_records.py; NaN for a token that was not trained on."""
    trained: np.ndarray
    """[n] bool: the tokens whose values were recorded."""


@dataclass(frozen=True)
class InspectedStep:
    run: str
    step: int
    group_size: int
    responses: Sequence[InspectedResponse]
    was_asked: bool
    """Whether lab.record_steps names the step."""
    files: int
    """Files of token values."""
    replicas: int
    """Data-parallel replicas, each with a file if it trained on a token; 0 without files."""


@dataclass(frozen=True)
class InspectOptions:
    step: int
    responses: int = 16
    """The worst of each measure that are shown."""
    model: Path | None = None
    """Directory of the tokenizer; None: the run's model.path."""
    rollouts: Path | None = None
    """Directory of the rollouts; None: the run's own, or those that it replays."""
    needs_texts: bool = True
    """Whether a tokenizer that is not there is an error."""
    keeps_traces: bool = False
    """Whether samples keep their routing traces, which are a hundred times as large as what a page shows."""


def load_step(path: Path, options: InspectOptions) -> InspectedStep:
    """Reads a step.

    Raises MissingFileError if the run, its tokenizer or the step's rollouts are not there, and StoreError,
    TokenFileError or ReportError if a file is damaged or the files do not belong together.
    """
    (run, size), step = load_run_of_train(path), options.step
    texts = _texts(run, options)
    samples: dict[int, Sample] = {}
    files = _rollout_files(run, step, options.rollouts)
    for number, sample in _read_samples(files, size, keeps_traces=options.keeps_traces):
        if number in samples:
            raise ReportError(f"{run.path}: step {step} has sample {number} twice; its rollouts are of several runs")
        samples[number] = sample
    _check_whole(run, step, files, {number // size for number in samples})
    files = sorted((run.path / "tokens").glob(f"step-{step:06d}-dp-*.parquet"))
    recorded: dict[int, dict[str, np.ndarray]] = {}
    replicas = 0
    for file in files:
        found = read_tokens(file)
        replicas = found.replicas
        recorded |= _by_sample(file, found.columns, samples)
    names = sorted({name for part in recorded.values() for name in part} - {SAMPLE, POSITION})
    responses = [
        _response(number, sample, texts.of(sample) if texts else [], names, recorded.get(number))
        for number, sample in sorted(samples.items())
    ]
    asked = str(step) in re.findall(r"\d+", str(run.config.get("lab.record_steps", "")))
    return InspectedStep(run.name, step, size, responses, asked, len(files), replicas)


def _read_samples(files: Sequence[Path], group_size: int, *, keeps_traces: bool) -> Iterator[tuple[int, Sample]]:
    """Yields each sample with its number, without its top tokens, and without its trace unless it is to be kept."""
    for file in files:
        for group in read_groups(file):
            for sample in group.samples:
                number = group.index * group_size + sample.index
                trace = sample.trace if keeps_traces else None
                yield number, dataclasses.replace(sample, trace=trace, top_tokens=None)


def _rollout_files(run: LoadedRun, step: int, given: Path | None) -> list[Path]:
    source = run.config.get("rollout.replay_from", "null")
    replays = source not in ("null", "", "~")
    directory = given or (Path(source) if replays else run.path) / "rollouts"
    made = int(run.metrics.steps.max(initial=0))
    if replays and step > made:
        raise MissingFileError(
            f"{run.path}: the run has made {made} steps of those that it replays. Name another --step."
        )
    if files := rollout_files(directory, step):
        return files
    steps = steps_of(directory)
    has = f"it has those of steps {steps[0]} to {steps[-1]}" if steps else "it has none"
    why = ", which the run replays" if replays and given is None else ""
    fix = "Name another --step" if steps else "Name the directory that has them with --rollouts"
    raise MissingFileError(f"{directory}{why}: no rollouts of step {step}; {has}. {fix}.")


def _check_whole(run: LoadedRun, step: int, files: Sequence[Path], groups: Collection[int]) -> None:
    """Raises ReportError if the files have not all groups that the configuration asks for."""
    asked = run.config.get("rollout.prompts_per_step", "")
    if asked.isdecimal() and len(groups) != int(asked):
        raise ReportError(
            f"{files[0].parent}: the files of step {step} have {len(groups)} groups, but rollout.prompts_per_step is "
            f"{asked}; they are not all there, or of another run. Copy the rollouts whole."
        )


def load_run_of_train(path: Path) -> tuple[LoadedRun, int]:
    """Reads a run, and the size of its groups. Raises as load_run does, and ReportError for a run of `sft`."""
    run = load_run(path)
    try:
        return run, int(run.config["rollout.group_size"])
    except (KeyError, ValueError):
        if not run.config:
            raise MissingFileError(
                f"{path / 'config.yaml'}: not there, so nothing else of the run can be read."
            ) from None
        raise ReportError(
            f"{path / 'config.yaml'}: has no rollout.group_size, as runs of `megatron-rl train` have. Runs of `sft` "
            "have no rollouts to read."
        ) from None


def _texts(run: LoadedRun, options: InspectOptions) -> _Texts | None:
    """Returns the texts of tokens; None if there is no tokenizer and none is needed."""
    directory = options.model or Path(run.config.get("model.path", run.path / "model"))
    if directory.is_dir():
        return _Texts(load_tokenizer(directory))
    if not options.needs_texts:
        return None
    raise MissingFileError(
        f"{directory}: the model whose tokenizer the run used is not there. Name it, or a copy, with --model."
    )


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
        elif (spaces := len(raw) - len(raw.lstrip("\u2581"))) > 0:  # SentencePiece drops the first space of a text
            text = " " * spaces + text.lstrip(" ")
        self._known[token] = text
        return text


def _by_sample(
    file: Path, columns: Mapping[str, np.ndarray], samples: Mapping[int, Sample]
) -> dict[int, dict[str, np.ndarray]]:
    """The recorded columns of each sample. Raises TokenFileError if they are not of these samples."""
    order = np.lexsort((columns[POSITION], columns[SAMPLE]))
    columns = {name: values[order] for name, values in columns.items()}
    numbers, starts = np.unique(columns[SAMPLE], return_index=True)
    found = {}
    for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(order)], strict=True):
        part = {name: values[start:end] for name, values in columns.items()}
        sample, at = samples.get(number), part[POSITION]
        if sample is None:
            raise TokenFileError(
                f"{file}: has sample {number}, which is not among the step's rollouts. Put the rollout files of all "
                "replicas there."
            )
        if at.max() >= len(sample.token_ids) or (sample.token_ids[at] != part["token_id"]).any():
            raise TokenFileError(
                f"{file}: its sample {number} has other tokens than that of the rollouts; the two are of different "
                "runs. Name the rollouts of this run with --rollouts, or remove the file."
            )
        found[number] = part
    return found


def _response(
    number: int, sample: Sample, texts: Sequence[str], names: Sequence[str], part: Mapping[str, np.ndarray] | None
) -> InspectedResponse:
    first, length = len(sample.prompt.token_ids), len(sample.token_ids)
    trained = np.zeros(length, dtype=bool)
    columns = {name: np.full(length, np.nan) for name in names}
    if part is not None:
        trained[part[POSITION]] = True
        for name in columns.keys() & part.keys():
            columns[name][part[POSITION]] = part[name]
    columns["rollout_logprob"] = np.where(sample.loss_mask, sample.rollout_logprobs, np.nan)
    return InspectedResponse(
        number, sample, texts, {name: values[first:] for name, values in columns.items()}, trained[first:]
    )
