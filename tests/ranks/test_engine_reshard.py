"""Checkpoints under another layout: weights and moments are the same to the bit, for every kind of weight."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import FAMILIES, make_family_model
from forks import Forks
from parity_checks import layouts_of

FIRST = {"moe": "tp=2,pp=2,ep=2", "dense": "tp=2,pp=2"}
OTHERS = {
    "moe": ["dp=4", "tp=4", "pp=4", "pp=2,vpp=2,ep=2", "cp=2,ep=4", "tp=2,ep=2,etp=2", "tp=2,etp=2,dp=2"],
    "dense": ["dp=4", "tp=4", "pp=4", "pp=2,vpp=2,dp=2", "cp=2,tp=2"],
}
DEFAULT = "qwen3_moe"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "family", [name if name == DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_checkpoint_is_read_under_every_layout(forks: Forks, tmp_path: Path, family: str) -> None:
    model = make_family_model(tmp_path / "model", family)
    kind = "moe" if "ep" in layouts_of(model)[-1] else "dense"
    forks.world(4, "reshard_worker:main", model, tmp_path, FIRST[kind], OTHERS[kind], "bf16")


@pytest.mark.distributed
def test_a_checkpoint_is_read_with_other_buckets(forks: Forks, tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", "qwen3_moe")
    forks.world(2, "reshard_worker:other_buckets", model, tmp_path)


@pytest.mark.distributed
def test_fp32_weights_are_restored_in_place(forks: Forks, tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", "qwen3")  # with tied embeddings
    forks.world(2, "reshard_worker:main", model, tmp_path, "pp=2", ["tp=2", "dp=2"], "fp32")
