"""Sampling by seed. test_rollout_logprobs.py tests the real server."""

from __future__ import annotations

import numpy as np
import torch

from megatron_rl.rollout.sglang_cpu_sampling import sample, seed_of, uniform

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
