"""The order of tokens by expert, without Megatron-Core's copies that change nothing."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher

from megatron_rl.engine.layers.permutation import use_equal_bits


@pytest.mark.parametrize(("order", "copies"), [([0, 1, 2], False), ([2, 0, 1], True)])
def test_chunks_are_copied_only_if_their_order_changes(order: list[int], copies: bool) -> None:
    use_equal_bits()
    rows, probs = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    sizes = torch.tensor([1, 2, 3])
    found, found_probs = token_dispatcher.sort_chunks_by_idxs(rows, sizes, torch.tensor(order), probs=probs)
    starts = [0, 1, 3]
    expected = [row for chunk in order for row in range(starts[chunk], starts[chunk] + sizes[chunk])]
    assert found[:, 0].tolist() == [2.0 * row for row in expected]
    assert found_probs.tolist() == expected
    assert (found is not rows) == copies
