"""Weights rounded to few bits and back, and weights with noise: pure functions of one whole tensor.

Each keeps shape and dtype, and computes in fp32. Rounding twice changes nothing: the largest absolute weight of a cell,
from which the scale follows, is kept to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

E4M3_LARGEST = 448.0
"""Largest number of fp8 e4m3, the format without infinities [2209.05433]."""
BLOCK = 128
"""Rows and columns of a block with one scale, and input columns of a group."""
_SMALLEST = 1e-30
"""Cells without a larger weight become 0: their scale might not be a normal fp32 number."""


def round_to_fp8(weight: Tensor, block: int | None = BLOCK) -> Tensor:
    """Returns weight [out, in] rounded to e4m3, to the nearest, ties to even.

    Each block x block cell has a scale of its own; None: the whole tensor has one. Cells at the lower and right edges
    may be smaller.
    """
    rows, columns = (block, block) if block else weight.shape
    return _round(weight, rows, columns, E4M3_LARGEST, lambda levels: levels.to(torch.float8_e4m3fn).float())


def round_to_integers(weight: Tensor, bits: int, group: int = BLOCK) -> Tensor:
    """Returns weight [out, in] rounded to integers of `bits`, from -(2^(bits-1) - 1) to 2^(bits-1) - 1, ties to even.

    Each row has a scale for every `group` columns. The last group of a row may be smaller.
    """
    return _round(weight, 1, group, 2.0 ** (bits - 1) - 1, torch.round)


def with_noise(weight: Tensor, size: float, seed: int) -> Tensor:
    """Returns weight * (1 + size * N(0, 1)), independently for each element.

    The noise follows from shape and seed. A GPU draws other numbers than a CPU.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device)
    return (weight.float() * (1 + size * noise)).to(weight.dtype)


def seed_of(*parts: object) -> int:
    """Returns a seed of 63 bits that follows from the parts' texts, and is the same in every process."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def relative_error(changed: Tensor, weight: Tensor) -> Tensor:
    """Returns |changed - weight| / |weight| in Frobenius norms, a scalar in fp32; 0 if nothing is changed."""
    whole = weight.float()
    error = torch.linalg.vector_norm(changed.float() - whole)
    return torch.where(error > 0, error / torch.linalg.vector_norm(whole), 0.0)


def _round(weight: Tensor, rows: int, columns: int, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Maps the largest absolute weight of each rows x columns cell to `largest`, rounds, and maps back."""
    out, width = weight.shape
    magnitude = _magnitudes(weight, rows, columns)
    magnitude = magnitude.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :width]
    levels = rounded(weight.float() / (magnitude / largest))
    # Not levels * scale: the scale's own rounding would move the largest weight.
    return (magnitude * (levels / largest)).to(weight.dtype)


def _magnitudes(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the largest absolute weight of each cell, or 1 if it is tiny, [cells down, cells across] fp32."""
    out, width = weight.shape
    padded = functional.pad(weight.abs(), (0, -width % columns, 0, -out % rows))
    cells = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = cells.amax((1, 3)).float()
    return torch.where(largest < _SMALLEST, 1.0, largest)
