"""The model directory that several files of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_directories import make

from megatron_rl.models.architecture import Architecture


@pytest.fixture
def moe(tmp_path: Path) -> tuple[Path, Architecture]:
    return make(tmp_path / "hf", "qwen3_moe")
