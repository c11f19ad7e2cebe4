"""Writes the page of one step: its responses, with tokens coloured by a measure, worst first. Without script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rl.disk import write_durably, writes
from megatron_rl.report.inspected import InspectedResponse, InspectedStep
from megatron_rl.report.rendering import fill
from megatron_rl.report.token_measures import MEASURES, Measure

WORST = 12
"""Tokens in a measure's table."""
LONG = 600
"""A response of more tokens shows its ends, and what stands around its worst tokens."""
MARGIN, PEAKS = 60, 4
"""Tokens shown on either side of a worst token, and worst tokens of each measure."""
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
    anchor: str
    """Id of a token that a table links to, else empty."""


@dataclass(frozen=True)
class ShownResponse:
    response: InspectedResponse
    advantage: float
    """Mean over its tokens; NaN if it was not trained on."""
    mini_batch: int | None
    """None if it was not trained on."""
    ranks: Mapping[str, int]
    """Its place in the order of each measure; 0 is the worst."""
    parts: Sequence[Sequence[ShownToken] | int]
    """Runs of tokens, and numbers of tokens that are left out."""


@dataclass(frozen=True)
class WorstToken:
    response: int
    """The response's number."""
    position: int
    """In the response, from 0."""
    text: str
    value: float
    title: str

    @property
    def anchor(self) -> str:
        return f"r{self.response}-{self.position}"


@dataclass(frozen=True)
class ShownMeasure:
    measure: Measure
    mean: float
    p99: float
    """99th percentile of the badness, of the values that are finite."""
    lost: int
    """Trained tokens whose value is not finite."""
    worst: Sequence[WorstToken]


@dataclass(frozen=True)
class StepPage:
    step: InspectedStep
    measures: Sequence[ShownMeasure]
    responses: Sequence[ShownResponse]
    """The worst of each measure."""


def compose(step: InspectedStep, most: int) -> StepPage:
    """Chooses the `most` worst responses of each measure, and colours their tokens."""
    present = [measure for measure in MEASURES if any(measure.of(each.columns) is not None for each in step.responses)]
    badness = {measure.key: [_badness(measure, each) for each in step.responses] for measure in present}
    ranks = {key: _ranks([each.max(initial=0.0) for each in of_all]) for key, of_all in badness.items()}
    measures = [_summarise(measure, step, badness[measure.key]) for measure in present]
    linked: dict[int, set[int]] = {}
    for token in itertools.chain.from_iterable(each.worst for each in measures):
        linked.setdefault(token.response, set()).add(token.position)
    shown = []
    for i, response in enumerate(step.responses):
        places = {key: order[i] for key, order in ranks.items()}
        chosen = {key: badness[key][i] for key, place in places.items() if place < most}
        if chosen:
            shown.append(_show(response, present, places, chosen, linked.get(response.number, set())))
    return StepPage(step, measures, shown)


def _badness(measure: Measure, response: InspectedResponse) -> np.ndarray:
    values = measure.of(response.columns)
    return np.zeros(len(response.texts)) if values is None else measure.badness(values, response.trained)


def _ranks(worst: Sequence[float]) -> list[int]:
    """The place of each in descending order; the first of equals comes first."""
    order = np.argsort(-np.array(worst), kind="stable")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return [int(place) for place in places]


def _show(
    response: InspectedResponse,
    measures: Sequence[Measure],
    ranks: Mapping[str, int],
    badness: Mapping[str, np.ndarray],
    linked: Collection[int],
) -> ShownResponse:
    """`badness`: of the measures for which the response was chosen."""
    columns, trained = response.columns, response.trained
    classes = _classes(response, measures)

    def token(i: int) -> ShownToken:
        anchor = f"r{response.number}-{i}" if i in linked else ""
        return ShownToken(response.texts[i], " ".join(classes[i]), _title(response, i), anchor)

    parts = [
        [token(i) for i in range(start, end)] if is_shown else end - start
        for start, end, is_shown in _runs(_windows(badness, len(response.texts), linked))
    ]
    advantage, mini_batch = math.nan, None
    if trained.any():
        advantage, mini_batch = float(columns["advantage"][trained].mean()), int(columns["mini_batch"][trained][0])
    return ShownResponse(response, advantage, mini_batch, ranks, parts)


def _classes(response: InspectedResponse, measures: Sequence[Measure]) -> list[list[str]]:
    """Class names of each token: KEY-LEVEL, with LEVEL such as 3 or n3; clipped and dropped."""
    found: list[list[str]] = [[] for _ in response.texts]
    for measure in measures:
        values = measure.of(response.columns)
        if values is None:
            continue
        for names, level in zip(found, measure.levels(values, response.trained).tolist(), strict=True):
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


def _windows(badness: Mapping[str, np.ndarray], count: int, linked: Collection[int]) -> np.ndarray:
    """[count] bool: the tokens of a response that the page shows."""
    shown = np.full(count, count <= LONG)
    if count > LONG:
        shown[:MARGIN] = shown[-MARGIN:] = True
        peaks = [i for values in badness.values() for i in np.argsort(-values, kind="stable")[:PEAKS].tolist()]
        for i in (*peaks, *linked):
            shown[max(i - MARGIN, 0) : i + MARGIN + 1] = True
    return shown


def _runs(shown: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Yields start, end and value of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(shown)) + 1).tolist(), len(shown)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield start, end, bool(shown[start])


def _summarise(measure: Measure, step: InspectedStep, badness: Sequence[np.ndarray]) -> ShownMeasure:
    everywhere = np.concatenate(badness)
    values = np.concatenate([_values(measure, each) for each in step.responses])
    owner = np.repeat(np.arange(len(badness)), [len(each) for each in badness])
    first = np.cumsum([0, *(len(each) for each in badness)])
    worst = []
    for i in np.argsort(-everywhere, kind="stable")[:WORST]:
        response, position = step.responses[owner[i]], int(i - first[owner[i]])
        if everywhere[i] > 0:
            text, title = response.texts[position], _title(response, position)
            worst.append(WorstToken(response.number, position, text, float(values[i]), title))
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ShownMeasure(measure, math.nan, math.nan, int(np.isinf(everywhere).sum()), worst)
    p99 = float(np.percentile(measure.badness(finite, np.ones(len(finite), dtype=bool)), 99))
    return ShownMeasure(measure, float(finite.mean()), p99, int(np.isinf(everywhere).sum()), worst)


def _values(measure: Measure, response: InspectedResponse) -> np.ndarray:
    values = measure.of(response.columns)
    return np.full(len(response.texts), np.nan) if values is None else values


def render(page: StepPage) -> str:
    shown = {each.response.number for each in page.responses}
    return fill("step.html", page=page, shown_numbers=shown, long=LONG)


def write(page: StepPage, directory: Path) -> Path:
    """Writes the page into the directory, and returns its path. Raises DiskError."""
    file = directory / f"step-{page.step.step:06d}.html"
    with writes(f"the page of step {page.step.step} in {directory}", directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(file, render(page).encode())
    return file
