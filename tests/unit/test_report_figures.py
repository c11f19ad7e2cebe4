"""Figures of many arms and of few seeds stay legible."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from megatron_rl.report.figures import FEW, Curve, CurvePlot, DrawnFigure, draw_arms, draw_curves

STEPS = np.arange(8.0)


def outside(drawn: DrawnFigure) -> list[str]:
    """Texts of the figure that its edge cuts."""
    canvas = drawn.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    axes = drawn.figure.axes[0]
    legend = axes.get_legend()
    (left, right), (low, high) = axes.get_xlim(), sorted(axes.get_ylim())
    ticks = [tick for tick in axes.get_xticklabels() if left <= tick.get_position()[0] <= right]
    ticks += [tick for tick in axes.get_yticklabels() if low <= tick.get_position()[1] <= high]
    texts = [*ticks, axes.xaxis.label, axes.yaxis.label]
    texts += legend.get_texts() if legend else []
    width, height = drawn.figure.bbox.width, drawn.figure.bbox.height
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in texts if text.get_text()}
    return [name for name, box in boxes.items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


def banded(count: int, half_width: float = 10.0) -> CurvePlot:
    """So many arms with values from 0 to 1, and bands as wide as those of two seeds."""
    curves = []
    for number in range(count):
        y = np.linspace(0, 1, 8)
        curves.append(Curve(f"n4-lr0.0002-r{number} (n = 2)", STEPS, y, y - half_width, y + half_width, color=number))
    return CurvePlot(curves, "share")


@pytest.mark.parametrize("arms", [1, 3, 20])
@pytest.mark.parametrize("length", [3, 24, 60])
def test_no_name_of_an_arm_is_cut(arms: int, length: int) -> None:
    names = [f"{number:02}-{'x' * length}" for number in range(arms)]
    assert outside(draw_arms({name: [0.1, 0.4] for name in names}, "share")) == []


def test_seeds_choose_the_range_of_arms_and_not_their_intervals() -> None:
    low, high = draw_arms({"a": [0.1, 0.4], "b": [0.2, 0.3]}, "share").figure.axes[0].get_xlim()
    assert low == pytest.approx(0.1 - 0.15 * 0.3)
    assert high == pytest.approx(0.4 + 0.15 * 0.3)


def test_lines_choose_the_range_and_not_bands() -> None:
    assert draw_curves(banded(2)).figure.axes[0].get_ylim() == pytest.approx((-0.15, 1.15))
    rising = np.geomspace(1e-4, 1e-2, 8)
    curves = [Curve("a", STEPS, rising, rising / 100, rising * 100, color=0)]
    drawn = draw_curves(CurvePlot(curves, "share", log=True))
    assert drawn.figure.axes[0].get_ylim() == pytest.approx((1e-4 / 1.5, 1.5e-2))


def test_a_legend_of_many_arms_is_below_the_axes_and_whole() -> None:
    for count in (FEW, FEW + 1, 20):
        drawn = draw_curves(banded(count))
        axes = drawn.figure.axes[0]
        legend = axes.get_legend()
        assert legend is not None
        assert outside(drawn) == []
        is_below = bool(legend.get_window_extent().y1 < axes.get_window_extent().y0)
        assert is_below is (count > FEW)
        assert len(axes.collections) == (0 if count > FEW else count)  # bands
        assert len({str(line.get_color()) for line in axes.lines}) == count
