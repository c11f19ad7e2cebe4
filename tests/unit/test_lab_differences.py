"""How far log-probs and gradients may be from a reference: what is not finite or missing never passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_rl.lab.differences import Bounds, Errors, GradientErrors, largest_and_rms

RNG = np.random.default_rng(0)
LARGE = RNG.normal(size=1_000_000).astype(np.float32)
SMALL = RNG.normal(size=64).astype(np.float32)


def compared(*pairs: tuple[np.ndarray, np.ndarray]) -> Errors:
    gradients = GradientErrors()
    for number, (found, expected) in enumerate(pairs):
        gradients.add(f"tensor {number}", found, expected)
    return gradients.errors(1e-6, 1e-6)


TRANSFORMERS = compared((LARGE * 1.02, LARGE), (SMALL * 1.05, SMALL))
FP32, BF16 = Bounds.of(None), Bounds.of(TRANSFORMERS)


def test_numbers_by_hand():
    found = compared((np.array([1.5, 2, 0], np.float32), np.array([1, 2, 0], np.float32)))
    assert (found.grad_max, found.grad_rms) == (pytest.approx(0.25), pytest.approx(0.5 / math.sqrt(5)))
    assert found.grad_tensor_rms == found.grad_rms
    assert largest_and_rms(np.array([3.0, -4.0])) == (4, pytest.approx(math.sqrt(12.5)))
    assert largest_and_rms(np.zeros(0)) == (0, 0)


def test_what_is_as_near_as_transformers_passes():
    assert BF16.allow(TRANSFORMERS)
    assert not FP32.allow(TRANSFORMERS)
    assert FP32.allow(compared((LARGE, LARGE)))


@pytest.mark.parametrize("bounds", [FP32, BF16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(bounds, value):
    odd = SMALL.copy()
    odd[3] = value
    for pairs in ([(odd, SMALL), (LARGE, LARGE)], [(LARGE, LARGE), (odd, SMALL)]):
        errors = compared(*pairs)
        assert errors.grad_max == errors.grad_tensor_rms == math.inf
        assert not bounds.allow(errors)
    assert largest_and_rms(odd) == (math.inf, math.inf)
    assert not bounds.allow(Errors(math.inf, math.inf))


@pytest.mark.parametrize("found", [np.zeros_like(SMALL), SMALL[::-1], -SMALL], ids=["zero", "shuffled", "negative"])
def test_a_small_gradient_that_is_lost_fails_beside_large_ones_that_are_right(found):
    errors = compared((LARGE, LARGE), (found, SMALL))
    assert errors.worst_gradient == "tensor 1"
    assert errors.grad_rms is not None
    assert errors.grad_rms < BF16.grad  # it is lost in the mean over all
    assert not BF16.allow(errors)


def test_a_server_is_judged_by_its_log_probs():
    assert FP32.allow(Errors(1e-5, 1e-6))
    assert not FP32.allow(Errors(3e-5, 1e-6))
    assert BF16.allow(Errors(5.0, 1e-6))
