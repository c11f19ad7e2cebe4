"""Draws figures with matplotlib, as SVG for the page and as PNG for files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_rl.report.curves import LayerMap, SeedBand, decimate, student_t95

SIZE = (5.2, 3.2)
"""Inches; small, so that the text stays legible on a page of 400 pixels."""
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "megatron-rl",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "lines.linewidth": 1.2,
    "legend.fontsize": 8,
    "legend.framealpha": 0.7,
    "text.parse_math": False,  # a name of a run may have dollar signs
    "path.simplify": True,
}
FEW = 6
"""More labelled curves than these have their legend below the axes, and no bands: both would hide the curves."""
ROW = 0.2
"""Inches of a row of a legend below the axes, or of an arm."""
MAX_NAME = 30
"""Characters of an arm's name beside its row."""
MARKED = 30
"""Curves of at most this many points have markers, so that a run of one step shows a point."""


@dataclass(frozen=True, eq=False)
class DrawnFigure:
    svg: bytes
    figure: Figure

    def png(self) -> bytes:
        """The same figure as PNG, which takes as long to draw as the SVG."""
        return _save(self.figure, format="png", dpi=130, metadata={"Software": None})


@dataclass(frozen=True)
class Curve:
    """x and y [points]; `low` and `high` [points] bound a band around it. A curve without a label is thin."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    color: int | None = None
    """Number of the colour; None takes the next."""
    stopped: bool = False
    """Whether to mark the end: the run stopped early there."""

    @classmethod
    def of_band(cls, label: str, band: SeedBand, color: int) -> Curve:
        if band.half_width is None:
            return cls(label, band.steps, band.mean, color=color)
        bounds = band.mean - band.half_width, band.mean + band.half_width
        return cls(label, band.steps, band.mean, *bounds, color=color)


@dataclass(frozen=True)
class CurvePlot:
    curves: Sequence[Curve]
    unit: str
    log: bool = False
    across: str = "step"
    """What the horizontal axis counts."""
    marks: Sequence[float] = field(default_factory=tuple)
    """Steps with a vertical line: the first signs of the verdict."""
    points: int = 600

    @cached_property
    def floor(self) -> float:
        """Half of the smallest value above 0: a band that reaches 0 ends here on a logarithmic axis."""
        values = np.concatenate([curve.y for curve in self.curves])
        return float(values[values > 0].min(initial=np.inf)) / 2


def draw_curves(plot: CurvePlot) -> DrawnFigure:
    with _figure() as (figure, axes):
        labelled = sum(bool(curve.label) for curve in plot.curves)
        banded = labelled <= FEW and any(curve.low is not None for curve in plot.curves)
        shown = [_drawn(axes, curve, plot, banded) for curve in plot.curves]
        if plot.log and any(shown):
            axes.set_yscale("log")
            _plain_decades(axes)
        for mark in plot.marks:
            axes.axvline(mark, color="firebrick", linewidth=0.8, linestyle=":")
        if banded:
            _fit_to_lines(axes, plot)
        axes.set_xlabel(plot.across)
        axes.set_ylabel(plot.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if labelled > FEW:
            _legend_below(figure, axes, labelled)
        elif labelled > 1:
            axes.legend(loc="best")
        if plot.log and not any(shown):
            axes.text(0.5, 0.5, "all values are 0", ha="center", va="center", transform=axes.transAxes)
        return _finish(figure)


def _drawn(axes: Axes, curve: Curve, plot: CurvePlot, banded: bool) -> bool:
    """Draws the curve; returns whether it has points. On a log axis only numbers above 0 can be shown."""
    there = np.isfinite(curve.y) & ((curve.y > 0) | (not plot.log))
    color = _color(curve.color, plot) if curve.color is not None else None
    x, y = decimate(curve.x[there], curve.y[there], plot.points)
    marker = "o" if len(x) <= MARKED else ""
    (line,) = axes.plot(x, y, label=curve.label or "_", color=color, marker=marker, markersize=3)
    if not curve.label:
        line.set(linewidth=0.6, alpha=0.6)
    if banded and curve.low is not None and curve.high is not None:
        low = np.maximum(curve.low[there], plot.floor) if plot.log else curve.low[there]
        axes.fill_between(curve.x[there], low, curve.high[there], color=line.get_color(), alpha=0.2, linewidth=0)
    if curve.stopped and len(x):
        axes.plot(x[-1:], y[-1:], marker="x", color=line.get_color(), markersize=7, linestyle="")
    return bool(there.any())


def _color(number: int, plot: CurvePlot) -> Any:
    """Ten colours, or twenty if there are more curves than ten."""
    last = max(curve.color for curve in plot.curves if curve.color is not None)
    return f"C{number}" if last < 10 else matplotlib.colormaps["tab20"](number % 20)


def _fit_to_lines(axes: Axes, plot: CurvePlot) -> None:
    """Chooses the vertical range by the lines: the band of two seeds would be ten times as wide."""
    values = np.concatenate([curve.y[np.isfinite(curve.y) & ((curve.y > 0) | (not plot.log))] for curve in plot.curves])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if plot.log:
        axes.set_ylim(low / 1.5, high * 1.5)
    else:
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _legend_below(figure: Figure, axes: Axes, entries: int) -> None:
    width, height = SIZE
    below = 0.55 + ROW * -(-entries // 2)
    figure.set_size_inches(width, height + below - 0.3)
    figure.subplots_adjust(bottom=below / (height + below - 0.3), top=1 - 0.22 / (height + below - 0.3))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / (height - 0.52)), ncols=2, frameon=False)


def draw_arms(values: Mapping[str, Sequence[float]], unit: str) -> DrawnFigure:
    """A row for each arm: a dot for each seed, and the mean with the 95% interval of Student's t if there are several.

    The dots choose the horizontal range; an interval may leave it.
    """
    with _figure() as (figure, axes):
        height = 0.9 + ROW * len(values)
        figure.set_size_inches(SIZE[0], height)
        names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in values]
        figure.subplots_adjust(left=0.05 + 0.017 * max(map(len, names)), bottom=0.6 / height, top=1 - 0.1 / height)
        for number, seeds in enumerate(values.values()):
            color = f"C{number % 10}"
            axes.plot(seeds, [number] * len(seeds), "o", color=color, markersize=4, alpha=0.7)
            if len(seeds) > 1:
                error = student_t95(len(seeds) - 1) * np.std(seeds, ddof=1) / np.sqrt(len(seeds))
                axes.errorbar(np.mean(seeds), number + 0.2, xerr=error, color=color, capsize=3, marker="|")
        axes.set_yticks(range(len(values)), names)
        axes.set_ylim(len(values) - 0.5, -0.5)
        low, high = (f(f(seeds) for seeds in values.values()) for f in (min, max))
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.set_xlabel(unit)
        return _finish(figure)


def draw_layers(found: LayerMap, unit: str) -> DrawnFigure:
    """Heat map over steps and layers; the colour is logarithmic if the values above 0 span two decades."""
    with _figure() as (figure, axes):
        axes.grid(visible=False)
        above = found.values[found.values > 0]
        wide = len(above) and above.max() / above.min() > 100
        norm = LogNorm(above.min(), above.max()) if wide else None
        shown = np.where(found.values > 0, found.values, np.nan) if wide else found.values
        axes.set_facecolor("0.9")  # no value, or 0 on a logarithmic scale
        # Rows are evenly spaced, and labelled by global number, because layers without experts have no row.
        image = axes.imshow(
            shown, aspect="auto", origin="lower", interpolation="nearest", norm=norm, extent=_extent(found)
        )
        rows = np.unique(np.linspace(0, len(found.layers) - 1, min(8, len(found.layers))).round().astype(int))
        axes.set_yticks(rows, [str(found.layers[row]) for row in rows])
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label=unit)
        return _finish(figure)


def _extent(found: LayerMap) -> tuple[float, float, float, float]:
    first, last = float(found.steps[0]), float(found.steps[-1])
    half = 0.5 if len(found.steps) < 2 else (last - first) / (len(found.steps) - 1) / 2
    return first - half, last + half, -0.5, len(found.layers) - 0.5


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(left=0.16, right=0.97, bottom=0.17, top=0.94)  # a layout engine takes half of the time
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _plain_decades(axes: Axes) -> None:
    """Labels a logarithmic axis 0.01, 1e-05, ...; an axis of few decades has labels between them too.

    Plain text instead of mathematics: it is drawn several times as fast.
    """
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g") if high < 1000 * low else NullFormatter())
    if 3 * low <= high < 1000 * low:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def _finish(figure: Figure) -> DrawnFigure:
    return DrawnFigure(_save(figure, format="svg", metadata={"Date": None, "Creator": None}), figure)


def _save(figure: Figure, **options: Any) -> bytes:
    image = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(image, **options)
    return image.getvalue()
