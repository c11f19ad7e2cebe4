"""Every family against transformers: log-probs and gradients in six kinds of layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import FAMILIES, make_family_model
from tiny_models import VOCAB_SIZE

from megatron_rl import parity
from megatron_rl.models.architecture import read_architecture

LAYOUTS = {
    "moe": ["tp=1", "tp=2", "pp=2,vpp=2", "cp=2,ep=2", "tp=2,ep=2,etp=2", "tp=2,pp=2,ep=2"],
    "dense": ["tp=1", "tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "tp=2,pp=2"],
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, VOCAB_SIZE, n).tolist() for n in (5, 17, 40, 33, 9, 24, 3, 12, 50, 21, 2, 31)]
    path = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = make_family_model(tmp_path_factory.mktemp("family") / family, family)
        return made[family]

    return model


def check(model: Path, tokens: Path, layouts: list[str], capsys: pytest.CaptureFixture[str], **options: Any) -> None:
    capsys.readouterr()
    status = parity.run(model, tokens, layouts, device="cpu", as_json=True, **options)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [each["layout"] for each in results] == layouts
    for each in results:
        assert each["logprob_max"] <= 2e-5, each
        assert each["grad_max"] <= 1e-4, each
    assert status == 0


def layouts_of(model: Path) -> list[str]:
    return LAYOUTS["moe" if read_architecture(model).num_experts else "dense"]


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers(
    forked_ranks: None,
    model_of: Callable[[str], Path],
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
) -> None:
    """In the layout that cuts most of it; the slow test has the others, and recomputation."""
    check(model_of(family), tokens, layouts_of(model_of(family))[-1:], capsys)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers_in_every_layout(
    forked_ranks: None,
    model_of: Callable[[str], Path],
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    recompute: str,
) -> None:
    check(model_of(family), tokens, layouts_of(model_of(family)), capsys, recompute=recompute)
