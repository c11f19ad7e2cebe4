"""Fills the templates of pages. All text of runs and studies is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def fill(template: str, filters: dict[str, Callable[..., Any]] | None = None, /, **values: Any) -> str:
    """Returns the page; every template has the filter `number`."""
    environment = Environment(
        loader=PackageLoader("megatron_rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, **(filters or {})}
    return environment.get_template(template).render(values)


def number(value: float | None) -> str:
    """Six significant digits; "-" if there is no number."""
    return "-" if value is None or math.isnan(value) else f"{value:.6g}"
