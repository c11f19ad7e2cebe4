"""Log-probs of labels and of more tokens under vocabulary parallelism, against log_softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forks import Forks
from logprobs_worker import inputs


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probs_of_more_tokens_and_their_gradients_equal_log_softmax(forks: Forks, ranks: int) -> None:
    hidden, weight, labels, top, slopes = (each.double() if each.is_floating_point() else each for each in inputs(None))
    hidden.requires_grad_()
    weight.requires_grad_()
    whole = (hidden @ weight.t() / 0.7).log_softmax(-1)
    ids = torch.cat([labels[:, None], top], dim=1)
    expected = whole.gather(1, ids)
    (expected * slopes).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    found = forks.world(ranks, "logprobs_worker:main", 4)
    for logprobs, gradient, _, entropy in found:
        np.testing.assert_allclose(logprobs, expected.detach(), atol=1e-5)
        np.testing.assert_allclose(gradient, hidden.grad, atol=2e-5)
        np.testing.assert_allclose(entropy, -(whole.exp() * whole).sum(-1).detach(), atol=1e-5)
    rows = np.concatenate([each[2] for each in found])
    np.testing.assert_allclose(rows[:13], weight.grad, atol=2e-5)
    assert not rows[13:].any(), "padding of the vocabulary has no gradient"


@pytest.mark.distributed
def test_more_tokens_do_not_change_the_labels_log_probs(forks: Forks) -> None:
    """Else the ratios of the first mini-batch would not be exactly 1: pi_old's pass asks for no more tokens."""
    with_more, without = (forks.world(2, "logprobs_worker:main", k) for k in (4, 0))
    for one, other in zip(with_more, without, strict=True):
        assert [row[0] for row in one[0]] == [row[0] for row in other[0]]
