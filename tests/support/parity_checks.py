"""What the tests of parity share: token files, and the bounds that results must keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import VOCAB_SIZE

from megatron_rl.models.architecture import read_architecture

Compare = Callable[..., tuple[int, list[dict[str, Any]]]]
"""(model, tokens, layouts, options of parity.run) -> (status, result of each layout)."""


LAYOUTS = {
    "moe": ["tp=1", "tp=2", "pp=2,vpp=2", "cp=2,ep=2", "tp=2,ep=2,etp=2", "tp=2,pp=2,ep=2"],
    "dense": ["tp=1", "tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "tp=2,pp=2"],
}
"""What the table of parity has for each family."""


def layouts_of(model: Path) -> list[str]:
    return LAYOUTS["moe" if read_architecture(model).num_experts else "dense"]


def write_sequences(path: Path) -> Path:
    """Writes sequences of unequal length, enough for the micro-batches of every layout."""
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, VOCAB_SIZE, n).tolist() for n in (5, 17, 40, 33, 9, 24, 3, 12, 50, 21, 2, 31)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def check(compare: Compare, model: Path, tokens: Path, layouts: list[str], recompute: str = "none") -> None:
    status, results = compare(model, tokens, layouts, recompute=recompute)
    assert [r["layout"] for r in results] == layouts
    for result in results:
        assert result["logprob_max"] <= 2e-5, result
        assert result["grad_max"] <= 1e-4, result
        assert result["tokens"] == 235
    assert status == 0
