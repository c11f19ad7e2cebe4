"""Starting ranks of our own on this machine, for the tools that do so (parity); training is started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from megatron_rl.cores import threads_per_process


def run_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Runs `python -m module arguments` on `ranks` local ranks under torchrun; returns the exit status."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        module,
        *arguments,
    ]
    threads = 1 if torch.cuda.is_available() else threads_per_process(ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, env=environment, check=False).returncode
