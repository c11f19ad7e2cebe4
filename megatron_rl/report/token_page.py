"""Writes the page of one step: its responses, with tokens coloured by a measure, worst first. Without script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_rl.disk import write_durably, writes
from megatron_rl.report.inspected import InspectedResponse, InspectedStep
from megatron_rl.report.page import number
from megatron_rl.report.token_measures import MEASURES, Measure

WORST = 12
"""Tokens in a measure's table."""
LONG = 600
"""A response of more tokens shows its ends, and what stands around its worst tokens."""
MARGIN, PEAKS = 60, 4
"""Tokens shown on either side, and worst tokens of each measure."""
TOOLTIP = {
    "rollout_logprob": "log mu",
    "old_logprob": "log pi_old",
    "logprob": "log pi_theta",
    "entropy": "entropy",
    "advantage": "A",
    "expert_change/old_policy/live": "expert change",
    "expert_change/rollout_old/live": "from rollout",
}
"""Columns that a token's tooltip and the tables name."""


@dataclass(frozen=True)
class ShownToken:
    text: str
    classes: str
    title: str


@dataclass(frozen=True)
class ShownResponse:
    number: int
    response: InspectedResponse
    advantage: float
    """Mean over its tokens; NaN if it was not trained on."""
    ranks: dict[str, int]
    """Its place in the order of each measure; 0 is the worst."""
    parts: Sequence[Sequence[ShownToken] | int]
    """Runs of tokens, and numbers of tokens that are left out."""


@dataclass(frozen=True)
class WorstToken:
    response: int
    position: int
    """In the response, from 0."""
    text: str
    value: float
    title: str


@dataclass(frozen=True)
class ShownMeasure:
    measure: Measure
    mean: float
    p99: float
    """99th percentile of the badness."""
    worst: Sequence[WorstToken]


@dataclass(frozen=True)
class StepPage:
    step: InspectedStep
    measures: Sequence[ShownMeasure]
    responses: Sequence[ShownResponse]
    """At most so many of the worst of each measure."""


def compose(step: InspectedStep, most: int) -> StepPage:
    """Chooses the `most` worst responses of each measure, and colours them."""
    present = [measure for measure in MEASURES if any(measure.of(each.columns) is not None for each in step.responses)]
    badness = {measure.key: [_badness(measure, each) for each in step.responses] for measure in present}
    ranks = {key: _ranks([each.max(initial=0.0) for each in of_all]) for key, of_all in badness.items()}
    chosen = [i for i in range(len(step.responses)) if any(order[i] < most for order in ranks.values())]
    shown = [
        _show(
            step.responses[i],
            present,
            {key: order[i] for key, order in ranks.items()},
            {k: b[i] for k, b in badness.items()},
        )
        for i in chosen
    ]
    return StepPage(step, [_summarise(measure, step, badness[measure.key]) for measure in present], shown)


def _badness(measure: Measure, response: InspectedResponse) -> np.ndarray:
    values = measure.of(response.columns)
    return np.zeros(len(response.texts)) if values is None else measure.badness(values)


def _ranks(worst: Sequence[float]) -> list[int]:
    """The place of each in descending order; the first of equals comes first."""
    order = np.argsort(-np.array(worst), kind="stable")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return [int(place) for place in places]


def _show(
    response: InspectedResponse, measures: Sequence[Measure], ranks: dict[str, int], badness: dict[str, np.ndarray]
) -> ShownResponse:
    advantages = response.columns.get("advantage", np.array([np.nan]))
    there = advantages[np.isfinite(advantages)]
    classes = _classes(response, measures)

    def token(i: int) -> ShownToken:
        return ShownToken(response.texts[i], " ".join(classes[i]), _title(response, i))

    parts = [
        [token(i) for i in range(start, end)] if shown else end - start
        for start, end, shown in _runs(_windows(badness, len(response.texts)))
    ]
    return ShownResponse(response.number, response, float(there.mean()) if len(there) else float("nan"), ranks, parts)


def _classes(response: InspectedResponse, measures: Sequence[Measure]) -> list[list[str]]:
    """Class names of each token: KEY-LEVEL, with LEVEL such as 3 or n3; clipped and dropped."""
    found: list[list[str]] = [[] for _ in response.texts]
    for measure in measures:
        values = measure.of(response.columns)
        if values is None:
            continue
        for names, level in zip(found, measure.levels(values).tolist(), strict=True):
            if level:
                names.append(f"{measure.key}-{'n' * (level < 0)}{abs(level)}")
    for name in ("clipped", "dropped"):
        marks = np.nan_to_num(response.columns.get(name, np.zeros(len(found))))
        for names, mark in zip(found, marks.tolist(), strict=True):
            if mark:
                names.append(name)
    return found


def _title(response: InspectedResponse, i: int) -> str:
    values = {label: response.columns[name][i] for name, label in TOOLTIP.items() if name in response.columns}
    figures = [f"{label} {value:.4g}" for label, value in values.items() if np.isfinite(value)]
    return ", ".join([f"token {i}", *figures])


def _windows(badness: dict[str, np.ndarray], count: int) -> np.ndarray:
    """[count] bool: the tokens of a response that the page shows."""
    shown = np.full(count, count <= LONG)
    if count > LONG:
        shown[:MARGIN] = shown[-MARGIN:] = True
        for values in badness.values():
            for i in np.argsort(-values, kind="stable")[:PEAKS]:
                shown[max(i - MARGIN, 0) : i + MARGIN + 1] = True
    return shown


def _runs(shown: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Yields start, end and value of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(shown)) + 1).tolist(), len(shown)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield start, end, bool(shown[start])


def _summarise(measure: Measure, step: InspectedStep, badness: Sequence[np.ndarray]) -> ShownMeasure:
    found = [(each, measure.of(each.columns)) for each in step.responses]
    values = np.concatenate([each for _, each in found if each is not None])
    values = values[np.isfinite(values)]
    everywhere = np.concatenate(badness)
    owner = np.repeat(np.arange(len(badness)), [len(each) for each in badness])
    first = np.cumsum([0, *(len(each) for each in badness)])
    worst = []
    for i in np.argsort(-everywhere, kind="stable")[:WORST]:
        response, position = step.responses[owner[i]], int(i - first[owner[i]])
        of_response = found[owner[i]][1]
        if everywhere[i] > 0 and of_response is not None:
            value = float(of_response[position])
            text, title = response.texts[position], _title(response, position)
            worst.append(WorstToken(response.number, position, text, value, title))
    if not len(values):
        return ShownMeasure(measure, float("nan"), float("nan"), worst)
    return ShownMeasure(measure, float(values.mean()), float(np.percentile(measure.badness(values), 99)), worst)


def render(page: StepPage) -> str:
    """The page. All text of the run is escaped."""
    environment = Environment(
        loader=PackageLoader("megatron_rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("step.html").render(page=page, long=LONG)


def write(page: StepPage, directory: Path) -> Path:
    """Writes the page into the directory, and returns its path. Raises DiskError."""
    file = directory / f"step-{page.step.step:06d}.html"
    with writes(f"the page of step {page.step.step} in {directory}", directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(file, render(page).encode())
    return file
