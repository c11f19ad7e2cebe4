"""One line of metrics for a rollout step, from the lines of its optimizer steps.

Within a step the mini-batches differ by design: the first has ratios of 1, the last the largest drift. Curves over
optimizer steps therefore zigzag; curves over rollout steps do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Values = Mapping[str, float | None]
SPECIAL = {"min": min, "max": max}
"""How a statistic of several lines is combined, by the last part of its name; all others by their mean."""


def summarise(lines: Sequence[Values]) -> dict[str, float | None]:
    """Returns each metric's mean over the lines that have it; the smallest of minima and the largest of maxima.

    A metric that is not finite in one of the lines is None.
    """
    values: dict[str, list[float | None]] = {}
    for line in lines:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    return {name: _combine(name, found) for name, found in values.items()}


def _combine(name: str, found: Sequence[float | None]) -> float | None:
    finite = [value for value in found if value is not None]
    if len(finite) < len(found):
        return None
    if len(finite) == 1:
        return finite[0]
    combine = SPECIAL.get(name.rpartition("/")[2])
    return combine(finite) if combine else sum(finite) / len(finite)
