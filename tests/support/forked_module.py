"""Runs a module as a program in a forked process, which has what its parent has imported."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence


def fork_module(module: str, arguments: Sequence[str], first: Callable[[], None]) -> int:
    """Forks `python -m module arguments` and returns its process number. The new process calls `first` before."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        first()
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
