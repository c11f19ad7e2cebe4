"""The model directory that several files of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron_rl.models.architecture import Architecture


@pytest.fixture
def moe(tmp_path: Path) -> tuple[Path, Architecture]:
    from model_directories import make  # imports transformers

    return make(tmp_path / "hf", "qwen3_moe")
