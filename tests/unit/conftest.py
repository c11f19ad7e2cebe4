"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_directories import make

from megatron_rl.models.architecture import Architecture


@pytest.fixture
def seen() -> Iterator[Counter[str]]:
    """Counts accepted and refused examples. A test that only accepts or only refuses fails."""
    counts: Counter[str] = Counter()
    yield counts
    print(dict(counts))  # shown with -s
    assert set(counts) == {"accepted", "refused"}


@pytest.fixture
def moe(tmp_path: Path) -> tuple[Path, Architecture]:
    return make(tmp_path / "hf", "qwen3_moe")
