"""The root-mean-square norm in plain PyTorch against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_rl.engine.layers.norms import normalised


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_divides_by_the_root_of_eps_and_the_mean_of_squares(eps: float) -> None:
    x = torch.randn(5, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalised(x, eps), F.rms_norm(x, (12,), eps=eps))
    assert torch.equal(normalised(torch.zeros(3, 4), eps), torch.zeros(3, 4))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_its_gradient_is_that_of_its_operations(eps: float) -> None:
    x = torch.randn(3, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: normalised(each, eps), (x,))
