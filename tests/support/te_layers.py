"""Runs te_worker.py, and measures how far Transformer Engine's layers are from those in plain PyTorch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from paths import SUPPORT
from rl_runs import environment
from te_worker import LAYOUTS
from tiny_models import make_tiny_model

BOUNDS = {"log-probs": 1e-5, "gradients": 2e-5, "norms": 1e-4, "weights": 3e-6}
"""Largest differences between providers. Those of a gradient are relative to its largest element."""


def make_model(path: Path) -> Path:
    return make_tiny_model(path, num_layers=4, mlp_only_layers=(1,))


def compare(python: str, model: Path, directory: Path, out: Path, worlds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Runs te_worker.py with the interpreter `python`; returns what it wrote by layout. `worlds`: numbers of ranks."""
    done = subprocess.run(
        [python, str(SUPPORT / "te_worker.py"), str(model), str(directory), str(out), *map(str, worlds)],
        env={**environment(), "TORCHDYNAMO_DISABLE": "1"},  # it would need a C++ compiler
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {layout: torch.load(out / f"{layout}.pt") for ranks in worlds for layout in LAYOUTS[ranks]}


def errors(found: dict[str, Any]) -> dict[str, float]:
    """Returns the largest differences of a layout, by the names of BOUNDS."""
    te, plain = found["te"], found["torch"]
    return {
        "log-probs": found["logprobs_apart"],
        "gradients": max(
            float((te["gradients"][name] - gradient).abs().max() / gradient.abs().max())
            for name, gradient in plain["gradients"].items()
        ),
        "norms": max(
            abs(mine[name] / norm - 1)
            for mine, theirs in zip(te["norms"], plain["norms"], strict=True)
            for name, norm in theirs.items()
        ),
        "weights": max(float((te["weights"][name] - w).abs().max()) for name, w in plain["weights"].items()),
    }
