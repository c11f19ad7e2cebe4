"""Settings of the fuzzers: a few fixed examples in the default suite, and many in the slow suite."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FEW = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=10_000, derandomize=False)


def drawing(examples: int) -> settings:
    """Returns the settings of FEW with another number of examples."""
    return settings(FEW, max_examples=examples)
