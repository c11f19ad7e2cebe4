"""KL estimators: the specification's numbers, and what they estimate, over a whole distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.objectives.kl import k1, k2, k3, unbiased


@pytest.mark.parametrize(
    ("p", "q", "expected"), [(0.5, 0.4, (0.2231, 0.0249, 0.0231)), (0.4, 0.5, (-0.2231, 0.0249, 0.0269))]
)
def test_numbers_of_the_specification(p, q, expected):
    log_ratio = torch.tensor(math.log(q / p), dtype=torch.float64)
    found = [estimate(log_ratio).item() for estimate in (k1, k2, k3)]
    assert found == pytest.approx(expected, abs=5e-5)
    assert unbiased(log_ratio, torch.tensor(math.log(1.5))).item() == pytest.approx(1.5 * found[2])


def distributions(seed, count=3):
    logits = torch.as_tensor(np.random.default_rng(seed).normal(size=(count, 6)))
    return logits.log_softmax(-1)


@given(st.integers(0, 10**6))
def test_expectations_over_the_samples_are_the_kl(seed):
    policy, reference, old = distributions(seed)
    log_ratio = reference - policy
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert (policy.exp() * k1(log_ratio)).sum().item() == pytest.approx(exact)
    assert (policy.exp() * k3(log_ratio)).sum().item() == pytest.approx(exact)
    assert (old.exp() * unbiased(log_ratio, policy - old)).sum().item() == pytest.approx(exact)
    assert (k3(log_ratio) >= 0).all()
    assert (k2(log_ratio) >= 0).all()


@given(st.integers(0, 10**6))
def test_the_gradient_of_the_unbiased_form_is_that_of_the_kl(seed):
    _, reference, old = distributions(seed)
    logits = distributions(seed)[0].clone().requires_grad_()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((old.exp() * unbiased(reference - policy, policy - old)).sum(), logits)
    torch.testing.assert_close(found, exact)


def test_equal_policies_have_none():
    zero = torch.zeros(3)
    assert not any(estimate(zero).any() for estimate in (k1, k2, k3))
    assert not unbiased(zero, torch.ones(3)).any()
