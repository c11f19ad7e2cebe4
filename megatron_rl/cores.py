"""How many cores this process may use. More OpenMP threads than cores, over all processes, slow each a hundredfold."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those that the scheduler grants, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    return max(1, usable_cores() // processes)
