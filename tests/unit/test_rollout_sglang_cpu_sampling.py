"""Sampling by seed. test_rollout_logprobs.py tests the real server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.rollout.sglang_cpu_sampling import sample, sample_filtered, seed_of, take_seeds, uniform

DRAWS = 4096


def test_tokens_have_their_probabilities_over_seeds_and_over_positions() -> None:
    """A chi-squared test; impossible tokens are never drawn."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    logprobs = probabilities.log().expand(DRAWS, -1)
    many, one = torch.arange(DRAWS), torch.full((DRAWS,), 5)
    for seeds, positions in ((many, one), (one, many)):
        counts = sample(logprobs, seeds, positions).flatten().bincount(minlength=7).double()
        assert counts[probabilities == 0].sum() == 0
        wanted = DRAWS * probabilities[probabilities > 0]
        assert ((counts[probabilities > 0] - wanted) ** 2 / wanted).sum() < 3 + 6 * np.sqrt(6)


def test_a_request_without_a_seed_gets_that_of_its_name() -> None:
    """All tensor-parallel ranks of a server have to sample the same token."""
    assert seed_of(None, "a") == seed_of(None, "a") != seed_of(None, "b")
    assert 0 <= seed_of(None, "a") < 2**63
    assert seed_of(0, "a") == 0


def test_numbers_of_neighbouring_seeds_and_positions_are_independent() -> None:
    grid = uniform(np.repeat(np.arange(64), 64), np.tile(np.arange(64), 64)).reshape(64, 64)
    assert len(np.unique(grid)) == grid.size
    assert 0 <= grid.min() < grid.max() < 1
    for neighbour in (np.roll(grid, 1, axis=0), np.roll(grid, 1, axis=1)):
        assert abs(np.corrcoef(grid.ravel(), neighbour.ravel())[0, 1]) < 6 / 64


ALL = 1 << 30


def filtered(probs: torch.Tensor, **filters: list[float]) -> torch.Tensor:
    def column(name: str, unset: float) -> torch.Tensor:
        return torch.tensor(filters.get(name, [unset] * len(probs)))

    def sglangs(*_: object, **__: object) -> None:
        pytest.fail("SGLang's own function draws otherwise")

    seeds = torch.arange(len(probs))
    top_k, top_p, min_p = column("top_k", ALL).long(), column("top_p", 1.0), column("min_p", 0.0)
    return sample_filtered(sglangs, probs.clone(), top_k, top_p, min_p, "min_p" in filters, seeds, seeds, max_top_k=ALL)


def test_a_request_gets_the_same_tokens_beside_one_that_asks_for_filters() -> None:
    """Sums of probabilities are above 1, as rounding makes them, but by more, so that what it would drop shows."""
    rows = torch.rand(DRAWS, 50, generator=torch.Generator().manual_seed(0)).softmax(-1) * 1.5
    seeds = torch.arange(DRAWS)
    alone = sample(rows.log(), seeds, seeds).flatten()
    for name, value in (("top_k", 1), ("top_p", 0.3), ("min_p", 0.9)):
        unset = {"top_k": ALL, "top_p": 1.0, "min_p": 0.0}[name]
        beside = filtered(rows, **{name: [value, *[unset] * (DRAWS - 1)]})
        assert beside.dtype == torch.int32
        assert torch.equal(beside[1:].long(), alone[1:])
    assert filtered(rows, top_k=[1] * DRAWS).tolist() == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"min_p": 0.3}, {1, 3}),
        ({"min_p": 0.2}, {1, 3, 4, 5}),
        ({"top_k": 3, "min_p": 0.2}, {1, 3, 4}),
    ],
)
def test_only_tokens_that_the_filters_keep_are_drawn(filters: dict[str, float], kept: set[int]) -> None:
    rows = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.13, 0.12, 0.0]).expand(DRAWS, -1)
    drawn = filtered(rows, **{name: [value] * DRAWS for name, value in filters.items()})
    assert set(drawn.tolist()) == kept


def test_a_batch_without_requests_has_seeds_of_the_right_type() -> None:
    info: Any = SimpleNamespace()
    assert take_seeds(info, object, SimpleNamespace(reqs=[])).sampling_seed.dtype == torch.int64
