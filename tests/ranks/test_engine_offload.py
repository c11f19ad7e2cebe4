"""Networks that are moved to the host's memory and back, by Megatron-Core's own calls on a pretended GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from tiny_models import make_tiny_model


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_network_that_is_moved_leaves_no_memory_and_trains_on_with_the_same_bits(
    forks: Forks, tmp_path: Path, dtype: str
) -> None:
    """Frozen weights and a reference, which Megatron-Core moves in no buffer, are moved too."""
    for answers in forks.world(2, "offload_worker:main", make_tiny_model(tmp_path / "model"), dtype):
        assert answers == [True] * 10
