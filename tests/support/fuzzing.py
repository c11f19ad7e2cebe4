"""How the fuzzers draw: a few examples in the default suite, always the same ones, and many in the slow one."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FEW = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=10_000, derandomize=False)


def drawing(examples: int) -> settings:
    """As FEW, with another number of examples."""
    return settings(FEW, max_examples=examples)
