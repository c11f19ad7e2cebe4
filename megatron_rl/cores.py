"""Counts cores. If all processes together have more OpenMP threads than cores, each may run a hundred times slower."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that the scheduler grants this process; in a container, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    return max(1, usable_cores() // processes)
