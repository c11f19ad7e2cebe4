"""A run prints no start-up warnings of the libraries that it uses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from config_files import write
from rl_runs import environment, torchrun
from tiny_models import make_tiny_model

from megatron_rl.ranks.known_warnings import LOGGED

SFT = """\
run_dir: run
model: {path: model}
parallel: {tp: 2}
engine: {device: cpu, dtype: fp32, recompute: full}
data: {train: examples.jsonl, max_tokens: 200}
steps: 1
batch_size: 4
"""


@pytest.mark.distributed
def test_a_run_prints_no_warning(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_layers=1)
    write(tmp_path / "sft.yaml", SFT)
    write(tmp_path / "examples.jsonl", '{"prompt": "1+1=", "response": "2"}\n' * 4)
    command = torchrun(2, "-m", "megatron_rl", "sft", "sft.yaml")
    ours = {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 1/1" in done.stdout
    assert "Warning" not in done.stderr
    assert not [text for text in LOGGED.values() if text in done.stderr]
