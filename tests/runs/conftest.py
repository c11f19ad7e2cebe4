"""Fixtures that several files of this folder share."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from forks import Forks
from resume_runs import SFT, STEPS
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, sft.yaml and `whole`, an uninterrupted run with a checkpoint after each step."""
    root = tmp_path_factory.mktemp("resume")
    make_tiny_model(root / "model", num_layers=1, hidden_size=32, num_experts=4, expert_hidden_size=16)
    lines = (orjson.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) for i in range(8))
    (root / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (root / "sft.yaml").write_text(
        f"""
run_dir: {root / "unset"}
model: {{path: {root / "model"}}}
engine: {{device: cpu, dtype: fp32}}
optim: {{lr: 1.0e-3}}
data: {{train: {root / "data.jsonl"}, max_tokens: 32}}
steps: {STEPS}
batch_size: 3
checkpoint: {{every: 1, keep: 9}}
"""
    )
    done = forks.run(*SFT, root / "sft.yaml", f"run_dir={root / 'whole'}")
    assert done.status == [0], done.stderr
    return root
