"""Writes a report: one HTML page without script and without network, and a PNG of each figure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.disk import write_durably, writes
from megatron_rl.lab.health import AFTER_STEP, RULES, Severity, Sign
from megatron_rl.report.curves import POINTS
from megatron_rl.report.drawn import (
    FigureGroup,
    PageFigure,
    arm_figures,
    compared_figures,
    measure_figures,
    run_figures,
)
from megatron_rl.report.figures import DrawnFigure
from megatron_rl.report.loaded_runs import LoadedRun, differing_keys
from megatron_rl.report.loaded_studies import STATUSES, LoadedStudy
from megatron_rl.report.rendering import fill

PAGE = "report.html"
DETAILED = 4
"""At most this many runs side by side have all their figures on the page."""


@dataclass(frozen=True)
class RunSection:
    run: LoadedRun
    groups: Sequence[FigureGroup]


@dataclass(frozen=True)
class StudySection:
    study: LoadedStudy
    measures: Sequence[PageFigure]
    """Figures of the study's own metrics."""
    figures: Sequence[PageFigure]
    """Figures over steps."""
    differences: Sequence[tuple[str, list[str]]]
    """(key, value in each arm's first run)."""


@dataclass(frozen=True)
class ReportPage:
    studies: Sequence[StudySection]
    runs: Sequence[RunSection]
    compared: Sequence[PageFigure]
    differences: Sequence[tuple[str, list[str]]]
    """(key, value in each run)."""

    def images(self) -> Iterator[tuple[str, DrawnFigure]]:
        """Yields every figure with the name of its PNG file; a name that is taken gets a number."""
        taken: Counter[str] = Counter()
        for name, drawn in self._named():
            taken[name] += 1
            yield f"{name}-{taken[name]}.png" if taken[name] > 1 else f"{name}.png", drawn

    def _named(self) -> Iterator[tuple[str, DrawnFigure]]:
        for section in self.studies:
            for figure in (*section.measures, *section.figures):
                yield f"{_plain(section.study.name)}-{_plain(figure.key)}", figure.drawn
        for figure in self.compared:
            yield f"compared-{figure.key}", figure.drawn
        for each in self.runs:
            for figure in (figure for group in each.groups for figure in group.figures):
                yield f"{_plain(each.run.name)}-{figure.key}", figure.drawn


def compose(studies: Sequence[LoadedStudy], runs: Sequence[LoadedRun]) -> ReportPage:
    """Draws everything. Several runs share the points of one, so that the page does not grow with their number."""
    points = max(POINTS // max(len(runs), 1), 100)
    detailed = len(runs) <= DETAILED
    return ReportPage(
        [_study_section(study) for study in studies],
        [RunSection(run, run_figures(run, points) if detailed else []) for run in runs],
        compared_figures(runs, points) if len(runs) > 1 else [],
        differing_keys(runs) if len(runs) > 1 else [],
    )


def _study_section(study: LoadedStudy) -> StudySection:
    firsts = [runs[0] for runs in study.arms.values()]
    figures = arm_figures(study.arms, study.stopped)
    return StudySection(study, measure_figures(study), figures, differing_keys(firsts))


def render(report: ReportPage) -> str:
    filters = {"place": place, "severity": lambda each: Severity(each).name.lower()}
    return fill(
        "page.html", filters, report=report, rules=RULES, statuses=STATUSES, detailed=DETAILED, title=_title(report)
    )


def write(report: ReportPage, directory: Path) -> Path:
    """Writes report.html and figures/ into the directory, and returns the page's path. Raises DiskError."""
    with writes(f"the report in {directory}", directory):
        (directory / "figures").mkdir(parents=True, exist_ok=True)
        for name, drawn in report.images():
            (directory / "figures" / name).write_bytes(drawn.png())
        write_durably(directory / PAGE, render(report).encode())
    return directory / PAGE


def place(sign: Sign) -> str:
    """Step, mini-batch and layer of a sign, in words."""
    where = "evaluation" if sign.mini_batch == AFTER_STEP else f"mini-batch {sign.mini_batch}"
    layer = "" if sign.layer is None else f", layer {sign.layer}"
    return f"step {sign.step}, {where}{layer}"


def _title(report: ReportPage) -> str:
    names = [*(section.study.name for section in report.studies), *(section.run.name for section in report.runs)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)
