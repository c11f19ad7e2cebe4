"""What a command imports with Megatron-Core, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from rl_runs import environment

CHECK = """
import sys
import megatron_rl.engine.policy
import torch
loaded = {"torch._dynamo", "torch._inductor", "wandb"} & sys.modules.keys()
assert not loaded, loaded
assert torch.compile.__module__ == "torch"
import wandb
"""


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="on a GPU functions are compiled")
def test_without_a_gpu_the_engine_loads_neither_torchs_compiler_nor_wandb() -> None:
    """They take as long as all the rest. What was hidden meanwhile is there again afterwards."""
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
