"""Makes the conductor of a study fork its ranks, in a process that has imported everything."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence


def fork_ranks() -> None:
    from megatron_rl.ranks import launch

    launch.run_ranks = _run_one


def _run_one(module: str, arguments: Sequence[str], ranks: int) -> int:
    assert ranks == 1
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        os.setsid()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
