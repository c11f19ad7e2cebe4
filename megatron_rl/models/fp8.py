"""Values of weights that are stored in fp8 with one scale per block: pure functions of stretches of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.models.quantisation import Fp8Blocks

FP8 = "F8_E4M3"
"""What safetensors calls the dtype of such weights."""
SCALE_DTYPES = ("F32", "BF16")


def scale_name(weight: str) -> str:
    """Returns the name of the tensor with a weight's scales. It is named for what the quantiser divided by."""
    return f"{weight}_scale_inv"


def touched(size: int, start: int, length: int) -> tuple[int, int]:
    """Returns first and number of the blocks of `size` positions in which [start, start + length) lies; length > 0."""
    first = start // size
    return first, (start + length - 1) // size - first + 1


def decode(stretch: Tensor, scales: Tensor, blocks: Fp8Blocks, dim: int, start: int) -> Tensor:
    """Returns the values of fp8 weights, fp32 of the stretch's shape: each is multiplied by the scale of its block.

    stretch: [rows, columns] float8_e4m3fn, positions from `start` on along `dim`, and all along the other dimension.
    scales: [blocks down, blocks across], of the blocks that the stretch touches.
    """
    expanded = scales.float()
    for each, size in enumerate(blocks.size):
        before = start % size if each == dim else 0  # positions of the first block that lie before the stretch
        block_of = torch.arange(before, before + stretch.shape[each]) // size
        expanded = expanded.index_select(each, block_of)
    return stretch.float() * expanded
