"""Makes the conductor of a study fork its ranks, in a process that has imported everything."""

from __future__ import annotations

import os
from collections.abc import Sequence

from forked_module import fork_module


def fork_ranks() -> None:
    from megatron_rl.ranks import launch

    launch.run_ranks = _run_one


def _run_one(module: str, arguments: Sequence[str], ranks: int) -> int:
    assert ranks == 1
    return os.waitstatus_to_exitcode(os.waitpid(fork_module(module, arguments, os.setsid), 0)[1])
