"""Weights gathered from real ranks over gloo, in Megatron-Core's own process groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import make_family_model
from forks import Forks
from models_reference import TINY
from tiny_models import make_tiny_model


@pytest.mark.distributed
def test_two_ranks_export_the_checkpoint_and_the_check_detects_mistakes(forks: Forks) -> None:
    forks.world(2, "export_worker:two_ranks")


@pytest.mark.distributed
def test_four_ranks_export_the_checkpoint_and_reject_mismatches(forks: Forks, tmp_path: Path) -> None:
    for family, arguments in TINY.items():
        make_tiny_model(tmp_path / family, **arguments)
    make_family_model(tmp_path / "deepseek_v3", "deepseek_v3")
    forks.world(4, "export_worker:four_ranks", tmp_path)
