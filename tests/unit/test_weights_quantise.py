"""Rounding of weights against lists of all numbers of a format in float64, and the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stress_reference import e4m3_numbers, integers, rounded
from torch import Tensor

from megatron_rl.weights.quantise import relative_error, round_to_fp8, round_to_integers, seed_of, with_noise


@dataclass(frozen=True)
class Format:
    round: Callable[[Tensor], Tensor]
    numbers: np.ndarray
    rows: int
    columns: int
    error: float
    """Bound of |error| / |weight| for fp8, and of |error| / |largest weight of the cell| for integers."""


FORMATS = {
    "fp8 by block": Format(lambda w: round_to_fp8(w, 128), e4m3_numbers(), 128, 128, 1 / 16),
    "fp8 by small block": Format(lambda w: round_to_fp8(w, 4), e4m3_numbers(), 4, 4, 1 / 16),
    "fp8 by tensor": Format(lambda w: round_to_fp8(w, None), e4m3_numbers(), 10**6, 10**6, 1 / 16),
    "int8": Format(lambda w: round_to_integers(w, 8), integers(8), 1, 128, 0.5 / 127),
    "int4": Format(lambda w: round_to_integers(w, 4), integers(4), 1, 128, 0.5 / 7),
    "int4 by small group": Format(lambda w: round_to_integers(w, 4, 8), integers(4), 1, 8, 0.5 / 7),
}
formats = pytest.mark.parametrize("name", FORMATS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, a few of them large, and a row of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, columns)) * np.exp(2 * rng.normal(size=(rows, 1)))
    values[rng.random(values.shape) < 0.01] *= 30
    values[rows // 2] = 0
    return torch.from_numpy(values).to(dtype)


def test_the_list_of_e4m3_numbers_is_that_of_the_paper() -> None:
    """2209.05433, table 1: largest 448, smallest normal 2^-6, smallest 2^-9; two NaNs and two zeros of 256 codes."""
    numbers = e4m3_numbers()
    assert (len(numbers), numbers.max(), numbers[numbers > 0].min()) == (256 - 2 - 1, 448.0, 2.0**-9)
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(np.unique(codes[np.isfinite(codes)]), numbers)


@formats
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 257), (128, 256)])
def test_rounding_takes_the_nearest_number_of_the_format(name: str, shape: tuple[int, int]) -> None:
    form, weight = FORMATS[name], matrix(*shape)
    found, expected = form.round(weight), rounded(weight.numpy(), form.numbers, form.rows, form.columns)
    assert found.dtype == torch.float32
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found.numpy(), expected, rtol=3e-7, atol=1e-12 * largest)


@formats
def test_ties_go_to_the_even_number(name: str) -> None:
    """An even e4m3 number has an even mantissa. In the list from 0 up its place is even."""
    form = FORMATS[name]
    numbers = form.numbers[form.numbers >= 0]
    ties = (numbers[1:] + numbers[:-1]) / 2  # exact in fp32
    for tie, (place, low), high in zip(ties, enumerate(numbers), numbers[1:], strict=False):
        row = torch.tensor([[numbers.max(), tie, -tie]], dtype=torch.float32)  # its scale is 1
        even = low if place % 2 == 0 else high
        assert form.round(row).tolist() == [[numbers.max(), even, -even]]


@formats
@dtypes
def test_rounding_twice_changes_nothing(name: str, dtype: torch.dtype) -> None:
    form = FORMATS[name]
    for seed, (rows, columns) in enumerate(itertools.product((1, 5, 131), (7, 128, 300))):
        once = form.round(matrix(rows, columns, seed, dtype))
        assert once.dtype == dtype
        assert torch.equal(form.round(once), once)


@formats
def test_the_largest_weight_of_a_cell_is_kept_to_the_bit(name: str) -> None:
    for value in np.random.default_rng(0).uniform(1, 2, 200).astype(np.float32).tolist():
        assert FORMATS[name].round(torch.tensor([[value]])).item() == value


@formats
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 20), columns=st.integers(1, 150))
def test_the_error_is_at_most_half_the_distance_of_two_numbers(name: str, seed: int, rows: int, columns: int) -> None:
    form = FORMATS[name]
    weight = matrix(rows, columns, seed).double()
    error = (form.round(weight.float()).double() - weight).abs()
    largest = weight.abs().max()
    if name.startswith("fp8"):  # relative to the weight, down to half of the smallest number
        bound = form.error * weight.abs() + largest * 2.0**-10 / 448
    else:
        groups = weight.abs().split(form.columns, dim=1)
        bound = form.error * torch.cat([g.amax(1, keepdim=True).expand_as(g) for g in groups], 1)
    assert bool((error <= bound * (1 + 1e-4)).all())  # fp32 may take the farther of two numbers close to a tie


@formats
def test_weights_of_any_magnitude_stay_finite(name: str) -> None:
    round_ = FORMATS[name].round
    for magnitude in (0, 1e-44, 1e-38):
        assert torch.equal(round_(torch.full((3, 5), magnitude)), torch.zeros(3, 5))
    for magnitude in (1e-29, 3e38):
        weight = torch.tensor([[magnitude, -magnitude / 2, 0.0]])
        assert torch.isfinite(round_(weight)).all()
        assert round_(weight)[0, 0] == weight[0, 0]


def test_the_kinds_are_doses() -> None:
    """Fewer bits lose more. One large weight spoils a scale of the whole tensor, but not the scales of other blocks."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(256, 256))).float()
    int8, fp8, int4 = (relative_error(FORMATS[name].round(weight), weight) for name in ("int8", "fp8 by block", "int4"))
    assert 0.005 < int8 < 0.01 < 0.02 < fp8 < 0.03 < 0.1 < int4 < 0.15
    weight[0, 0] = 1e5
    rest = (slice(128, None), slice(128, None))
    block, tensor = (
        relative_error(FORMATS[f"fp8 by {cell}"].round(weight)[rest], weight[rest]) for cell in ("block", "tensor")
    )
    assert 0.02 < block < 0.03 < 0.05 < tensor


@dtypes
def test_noise_has_the_asked_size_and_follows_from_the_seed(dtype: torch.dtype) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).uniform(1, 2, (400, 500))).to(dtype)
    weight[3, 4] = 0
    noisy = with_noise(weight, 0.05, seed=1)
    change = ((noisy.double() - weight.double()) / weight.double())[weight != 0]
    assert noisy.dtype == dtype
    assert noisy[3, 4] == 0
    assert abs(change.mean()) < 5e-4
    assert abs(change.std() - 0.05) < 5e-4
    assert abs(np.corrcoef(change[1:], change[:-1])[0, 1]) < 0.01
    assert abs(relative_error(noisy, weight) - 0.05) < 5e-4
    assert torch.equal(with_noise(weight, 0.05, seed=1), noisy)
    other = ((with_noise(weight, 0.05, seed=2).double() - weight.double()) / weight.double())[weight != 0]
    assert abs(np.corrcoef(change, other)[0, 1]) < 0.01


def test_a_seed_follows_from_each_of_its_parts() -> None:
    assert seed_of(0, 3, "a") == seed_of(0, 3, "a") == 1743988494137492071
    assert (
        len({seed_of(*parts) for parts in [(0, 3, "a"), (1, 3, "a"), (0, 4, "a"), (0, 3, "b"), (0, 3), (3, 0, "a")]})
        == 6
    )
    assert all(0 <= seed_of(n) < 2**63 for n in range(100))


def test_the_relative_error_is_one_of_norms() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    assert relative_error(torch.tensor([[3.0, 5.0]]), weight) == pytest.approx(0.2)
    assert relative_error(weight.bfloat16() + 1, weight.bfloat16()) == pytest.approx(np.sqrt(2) / 5)
    far = torch.tensor([[1.0078125]]).bfloat16(), torch.tensor([[256.0]]).bfloat16()
    assert relative_error(*far) == pytest.approx(254.9921875 / 256)  # bf16 would round the difference to 255
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
