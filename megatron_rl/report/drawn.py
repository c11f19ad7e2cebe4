"""Turns panels and runs into the figures of a page, each with its definitions and its numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.lab.declared import WrittenName
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.report.curves import (
    POINTS,
    CurveStatistics,
    SeedBand,
    by_mini_batch,
    layer_map,
    seed_band,
    statistics_of,
)
from megatron_rl.report.figures import Curve, CurvePlot, DrawnFigure, draw_arms, draw_curves, draw_layers
from megatron_rl.report.loaded_runs import LoadedRun
from megatron_rl.report.loaded_studies import LoadedStudy
from megatron_rl.report.panels import COMPARED, PANELS, Panel, names_in, table_of

MAP_NOTE = "A column shows the largest value of its lines. Grey: no value, or 0 if the colours are logarithmic."


@dataclass(frozen=True)
class Definition:
    """What a figure's metric is, from its declaration."""

    name: str
    meaning: str
    kind: str
    unit: str
    source: str


@dataclass(frozen=True)
class PageFigure:
    key: str
    title: str
    image: str
    """Data URL of the SVG."""
    drawn: DrawnFigure
    definitions: Sequence[Definition]
    statistics: Sequence[tuple[str, CurveStatistics]]
    """(run, numbers) of each curve."""
    note: str = ""


@dataclass(frozen=True)
class FigureGroup:
    title: str
    figures: Sequence[PageFigure]


def run_figures(run: LoadedRun, points: int = POINTS) -> list[FigureGroup]:
    """All figures of one run; a figure without values is left out."""
    marks = [float(sign.step) for _, sign in filter(None, (run.health.first, run.health.decisive))]
    groups = []
    for group in PANELS:
        figures = [figure for panel in group.panels if (figure := _figure_of(run, panel, marks, points))]
        if figures:
            groups.append(FigureGroup(group.title, figures))
    return groups


def _figure_of(run: LoadedRun, panel: Panel, marks: Sequence[float], points: int) -> PageFigure | None:
    columns = table_of(run, panel)
    names = [name for name in names_in(columns, panel) if panel.form == "layers" or _has_numbers(run, panel, name)]
    if not names:
        return None
    note = ""
    if panel.form == "layers":
        found = layer_map(columns, names[0])
        if found is None:
            return None
        drawn, note = draw_layers(found, _unit(panel.file, names)), MAP_NOTE
        shown = [f"{names[0]}/{statistic}" for statistic in ("mean", "max")]
    elif panel.form == "mini-batches":
        curves = [Curve(name, *by_mini_batch(columns, name)) for name in names]
        drawn = draw_curves(CurvePlot(curves, _unit(panel.file, names), across="mini-batch"))
        note, shown = "Line: mean over all steps; band: smallest to largest.", names
    else:
        curves = [Curve(name, *columns.measured(name)) for name in names]
        drawn = draw_curves(CurvePlot(curves, _unit(panel.file, names), panel.log, marks=marks, points=points))
        note, shown = "Zeros are not shown on the logarithmic axis." if panel.log else "", names
    statistics = [(run.name, statistics_of(columns, name)) for name in shown if name in columns.names]
    return _page_figure(panel, drawn, shown, statistics, note)


def _has_numbers(run: LoadedRun, panel: Panel, name: str) -> bool:
    return bool(len(table_of(run, panel).measured(name)[0]))


def compared_figures(runs: Sequence[LoadedRun], points: int = POINTS) -> list[PageFigure]:
    """Figures in which all runs lie over each other, one metric each."""
    figures = []
    for panel in COMPARED:
        curves, statistics = [], []
        for number, run in enumerate(runs):
            if _has_numbers(run, panel, panel.names[0]):
                columns = table_of(run, panel)
                curves.append(Curve(run.name, *columns.measured(panel.names[0]), color=number))
                statistics.append((run.name, statistics_of(columns, panel.names[0])))
        if curves:
            drawn = draw_curves(CurvePlot(curves, _unit(panel.file, panel.names), panel.log, points=points))
            figures.append(_page_figure(panel, drawn, panel.names, statistics))
    return figures


def arm_figures(arms: Mapping[str, Sequence[LoadedRun]], stopped: frozenset[str]) -> list[PageFigure]:
    """Figures of a study: each arm's mean over its seeds with a band, and each seed as a thin line. `stopped` names the
    runs that stopped early."""
    figures = []
    for panel in COMPARED:
        curves, statistics = [], []
        for number, (arm, runs) in enumerate(arms.items()):
            having = [run for run in runs if _has_numbers(run, panel, panel.names[0])]
            if not having:
                continue
            seeds = [table_of(run, panel).by_step(panel.names[0]) for run in having]
            curves += [
                Curve("", *seed, color=number, stopped=run.name in stopped)
                for run, seed in zip(having, seeds, strict=True)
            ]
            band = _known(seed_band(seeds))
            curves.append(Curve.of_band(f"{arm} (n = {len(having)})", band, number))
            statistics += [(run.name, statistics_of(table_of(run, panel), panel.names[0])) for run in having]
        if curves:
            drawn = draw_curves(CurvePlot(curves, _unit(panel.file, panel.names), panel.log, points=POINTS // 3))
            figures.append(_page_figure(panel, drawn, panel.names, statistics))
    return figures


def measure_figures(study: LoadedStudy) -> list[PageFigure]:
    """Figures of the study's own metrics: each run's number, by arm."""
    figures = []
    for measure, (file, names, ratio) in study.measures.items():
        values: dict[str, list[float]] = {}
        for each in study.runs:
            value = each.metrics.get(measure)
            if value is not None:
                values.setdefault(each.arm, []).append(value)
        if values:
            panel = Panel(f"measure-{measure}", f"{measure} by arm", tuple(names), file=file)
            note = (
                "Dots: seeds. Bar: mean with the 95% interval of Student's t, which may leave the figure. study.yaml "
                "says how it is combined."
            )
            drawn = draw_arms(values, ratio or _unit(file, names))
            figures.append(_page_figure(panel, drawn, names, [], note))
    return figures


def _known(band: SeedBand) -> SeedBand:
    """The band without steps whose mean is not finite."""
    there = np.isfinite(band.mean)
    return SeedBand(band.steps[there], band.mean[there], None if band.half_width is None else band.half_width[there])


def _page_figure(
    panel: Panel,
    drawn: DrawnFigure,
    names: Sequence[str],
    statistics: Sequence[tuple[str, CurveStatistics]],
    note: str = "",
) -> PageFigure:
    image = "data:image/svg+xml;base64," + base64.b64encode(drawn.svg).decode()
    return PageFigure(panel.key, panel.title, image, drawn, list(_define(panel.file, names)), statistics, note)


def _define(file: str, names: Sequence[str]) -> Iterator[Definition]:
    """Yields one definition for each declared metric among the names, with all its statistics."""
    seen = set()
    for found in filter(None, (DECLARATION.find(file, name) for name in names)):
        base = _base(found)
        if base not in seen:
            seen.add(base)
            metric = found.metric
            yield Definition(base, found.meaning, metric.kind.value, metric.unit, metric.source)


def _base(found: WrittenName) -> str:
    return found.table.prefix + found.metric.name.format(**found.values)


def _unit(file: str, names: Sequence[str]) -> str:
    """The unit that all names share; empty if they have none or differ."""
    found = [DECLARATION.find(file, name) or DECLARATION.find(file, f"{name}/mean") for name in names]
    units = {each.metric.unit for each in found if each}
    return units.pop() if len(units) == 1 and units != {"1"} else ""
