"""Attention with sinks and sliding windows over packed sequences, next to the formula, one sequence after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.data.packing import cp_index
from megatron_rl.engine.layers.attention import padded_attention
from megatron_rl.engine.layers.plain_torch import TorchLayers

LENGTHS = (4, 12, 8, 32, 24)
HEADS, GROUPS, WIDTH, SCALE = 6, 2, 8, 0.3


def formula(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Returns attention [T, N * D] over one sequence, query by query and head by head."""
    rows = []
    for t, q in enumerate(query):
        first = 0 if window is None else max(0, t + 1 - window)
        heads = []
        for n, head in enumerate(q):
            group = n * GROUPS // HEADS
            scores = key[first : t + 1, group] @ head * SCALE
            logits = scores if sinks is None else torch.cat((scores, sinks[n : n + 1]))
            heads.append(logits.softmax(0)[: len(scores)] @ value[first : t + 1, group])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def packed(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), heads, WIDTH, generator=made) for heads in (HEADS, GROUPS, GROUPS)]
    return *(tensor.double().requires_grad_() for tensor in tensors), torch.linspace(
        -2, 3, HEADS
    ).double().requires_grad_()  # type: ignore[return-value]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("cp", [1, 2])
def test_packed_attention_is_the_formula(window: int | None, has_sinks: bool, cp: int) -> None:
    query, key, value, sinks = packed(LENGTHS)
    used = sinks if has_sinks else None
    bounds = np.cumsum([0, *LENGTHS])
    parts = [range(a, b) for a, b in itertools.pairwise(bounds)]
    expected = torch.cat([formula(query[p], key[p], value[p], window, used) for p in map(list, parts)])
    order = [torch.as_tensor(cp_index(bounds, cp, rank)) for rank in range(cp)]
    gathered = torch.cat(order)
    found = torch.zeros_like(expected)
    for rank, mine in enumerate(order):
        sequences = TorchLayers().packed_sequences(bounds, cp, rank, torch.device("cpu"))
        part = padded_attention(query[mine], key[gathered], value[gathered], sequences, SCALE, window, used)
        found = found.index_put((mine,), part)
    torch.testing.assert_close(found, expected)
    leaves = [query, key, value, *([sinks] if has_sinks else [])]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
