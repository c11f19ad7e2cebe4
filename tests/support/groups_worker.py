"""Starts and stops the process groups of a layout again and again in one world, as a study does."""

from __future__ import annotations

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
