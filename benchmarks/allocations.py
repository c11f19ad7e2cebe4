"""Bytes that torch allocates on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def allocated_peak(action: Callable[[], Any]) -> int:
    """Returns the most bytes that torch's allocator has given out at once while `action` runs, above what it had given
    out before. Exact: torch's profiler tells of each allocation and of each release."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
