"""Fixtures that several files of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from forks import Forks
from parity_checks import Compare, write_sequences
from resume_runs import SFT, STEPS
from tiny_models import make_tiny_model

from megatron_rl import parity


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


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequences(tmp_path_factory.mktemp("tokens") / "tokens.jsonl")


@pytest.fixture
def compare(forked_ranks: None, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Returns a function that compares with forked ranks and returns (status, results).

    tests/runs/test_cli.py and tests/ranks/test_ranks_launch.py start the command with real ranks.
    """

    def run(model: Path, tokens: Path, layouts: list[str], **options: Any) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        status = parity.run(model, tokens, layouts, device="cpu", as_json=True, **options)
        return status, [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run
