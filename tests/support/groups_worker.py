"""The process groups of a layout: started and stopped again and again in one world, as a study does, or idle."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.engine.device import use_device
from megatron_rl.ranks.place import start_process_groups, stop_process_groups


def main(text: str, rounds: int) -> list[int]:
    """Returns the number of this rank's threads after each round."""
    threads = []
    for _ in range(rounds):
        start_process_groups(Layout.resolve(*parse_layout(text)), use_device("cpu"), seed=0)
        stop_process_groups(leave_world=False)
        threads.append(psutil.Process().num_threads())
    return threads


def wakes_while_idle(text: str, seconds: float) -> int:
    """Returns how often this rank's threads woke while it waited."""
    start_process_groups(Layout.resolve(*parse_layout(text)), use_device("cpu"), seed=0)
    before = _wakes()
    time.sleep(seconds)
    woke = _wakes() - before
    stop_process_groups(leave_world=False)
    return woke


def _wakes() -> int:
    """Each wake-up ends a sleep, which the kernel counts as a voluntary switch."""
    lines = [line for file in Path("/proc/self/task").glob("*/status") for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
