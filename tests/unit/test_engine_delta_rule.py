"""The gated delta rule over packed sequences against the recurrence, token by token, of each sequence alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.data.packing import cp_index
from megatron_rl.engine.layers.chunk_plan import CHUNK, ChunkPlan, chunk_plan
from megatron_rl.engine.layers.delta_rule import chunked_delta_rule

CPU = torch.device("cpu")
HEADS, KEY, VALUE = 2, 5, 3
LENGTHS = [1, 130, 2, 63, 64, 65]


@dataclass(frozen=True)
class Inputs:
    """Of every token of a row: query and key [T, HEADS, KEY], value [T, HEADS, VALUE], decay and beta [T, HEADS]."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.decay, self.beta


def draw(tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    key = normal(KEY)
    inputs = Inputs(
        query=normal(KEY),
        key=key / key.norm(dim=-1, keepdim=True),
        value=normal(VALUE),
        decay=-0.1 * normal().abs(),
        beta=normal().sigmoid(),
    )
    for tensor in inputs.all():
        tensor.requires_grad_()
    return inputs


def bounds(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def token_by_token(inputs: Inputs, lengths: list[int]) -> Tensor:
    """Returns [T, HEADS, VALUE]; every sequence begins with a state of zeros."""
    outputs = []
    for start, end in itertools.pairwise(bounds(lengths).tolist()):
        state = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64)
        for token in range(start, end):
            query, key, value, decay, beta = (tensor[token] for tensor in inputs.all())
            state = state * decay.exp()[:, None, None]
            held = torch.einsum("hk,hkv->hv", key, state)
            state = state + torch.einsum("hk,hv->hkv", key, beta[:, None] * (value - held))
            outputs.append(torch.einsum("hk,hkv->hv", query, state))
    return torch.stack(outputs)


def packed(inputs: Inputs, lengths: list[int], cp: int = 1, cp_rank: int = 0) -> Tensor:
    """Returns the rank's part of the same, computed in chunks."""
    cu_seqlens = bounds(lengths)
    plan = chunk_plan(cu_seqlens, cp, cp_rank, CPU, before=0)
    gathered = np.concatenate([cp_index(cu_seqlens, cp, rank) for rank in range(cp)])
    chunks = [tensor[gathered][plan.rows].transpose(1, 2) for tensor in inputs.all()]
    query, key, value, decay, beta = chunks
    output = chunked_delta_rule(query, key, value, decay, beta, plan.steps)
    return output.transpose(1, 2).flatten(0, 1)[plan.order]


def test_packed_sequences_have_the_values_and_gradients_that_each_has_alone() -> None:
    inputs = draw(sum(LENGTHS))
    found, expected = packed(inputs, LENGTHS), token_by_token(inputs, LENGTHS)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad((output * weights).sum(), inputs.all()) for output in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_each_context_parallel_rank_keeps_its_own_tokens() -> None:
    lengths = [8, 136, 64]
    inputs = draw(sum(lengths))
    whole = token_by_token(inputs, lengths)
    for rank in range(2):
        mine = whole[cp_index(bounds(lengths), 2, rank)]
        torch.testing.assert_close(packed(inputs, lengths, 2, rank), mine, atol=1e-12, rtol=0)


def test_strong_decay_neither_overflows_nor_leaves_anything() -> None:
    inputs = draw(200)
    torch.testing.assert_close(
        packed(Inputs(inputs.query, inputs.key, inputs.value, inputs.decay - 800, inputs.beta), [200]),
        torch.einsum("thk,thk->th", inputs.query, inputs.key)[..., None] * inputs.beta[..., None] * inputs.value,
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("lengths", [[3], [70, 2, 64, 129], LENGTHS])
def test_chunks_hold_each_token_once_with_those_before_it_in_its_own_sequence(lengths: list[int]) -> None:
    before, cu_seqlens = 3, bounds(lengths)
    plan: ChunkPlan = chunk_plan(cu_seqlens, 1, 0, CPU, before)
    assert sorted(plan.rows[:, before:][plan.real[:, before:]].tolist()) == list(range(sum(lengths)))
    assert plan.rows[:, before:].flatten()[plan.order].tolist() == list(range(sum(lengths)))
    for rows, real in zip(plan.rows.tolist(), plan.real.tolist(), strict=True):
        start = max(bound for bound in cu_seqlens.tolist() if bound <= rows[before])
        assert (rows[before] - start) % CHUNK == 0
        preceding = [row for row, is_real in zip(rows[:before], real[:before], strict=True) if is_real]
        assert preceding == list(range(max(rows[before] - before, start), rows[before]))
