"""What a command imports with Megatron-Core, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


WITHOUT_GPU = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="of a machine without a GPU")


@WITHOUT_GPU
def test_without_a_gpu_the_engine_loads_neither_torchs_compiler_nor_wandb() -> None:
    """They take as long as all the rest. What was hidden meanwhile is there again afterwards."""
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@WITHOUT_GPU
def test_a_flash_mla_that_needs_a_gpu_does_not_end_the_import(tmp_path: Path) -> None:
    """As SGLang's package for GPUs brings it, its library cannot be loaded here."""
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").write_text("raise OSError('Could not load this library')\n")
    found = {**environment(), "PYTHONPATH": f"{tmp_path}:{environment().get('PYTHONPATH', '')}"}
    words = [sys.executable, "-c", "import megatron_rl.engine.policy"]
    done = subprocess.run(words, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
