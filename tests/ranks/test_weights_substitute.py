"""The verification under stress computes with the servers' weights, and gives the trainer its own back."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from stress_reference import copy_changed
from substitute_worker import int4
from tiny_models import make_tiny_model


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_compute_with_changed_weights_and_get_their_own_back(forks: Forks, tmp_path: Path, tied: bool) -> None:
    """Two tensor-parallel ranks pad the vocabulary of 45, and the last of two stages has a copy of tied embeddings."""
    model = make_tiny_model(tmp_path / "model", tied=tied, num_heads=8, num_kv_heads=2, num_layers=4)
    changed = copy_changed(model, tmp_path / "changed", int4)
    layouts = ["tp=2", "pp=2,vpp=2"] if tied else ["tp=2", "pp=2", "ep=2,tp=2,etp=1"]
    forks.world(2, "substitute_worker:main", model, changed, layouts)
