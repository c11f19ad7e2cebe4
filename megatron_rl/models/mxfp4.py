"""Values of weights that are stored in mxfp4 [OCP Microscaling Formats, 1.0]: pure functions of stretches of a tensor.

A block of 32 consecutive inputs of an output has 16 bytes, two weights each, and one exponent. The files have two
tensors of bytes in place of a weight [experts, in, out]: blocks [experts, out, in / 32, 16] and scales
[experts, out, in / 32].
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Weights with one scale."""
BYTES = "U8"
"""What safetensors calls the dtype of both tensors."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of fp4 e2m1 by its last three bits; the first is the sign."""
_BIAS = 127
"""An exponent e is stored as e + 127; 255 stands for NaN."""


def blocks_name(weight: str) -> str:
    return f"{weight}_blocks"


def scales_name(weight: str) -> str:
    return f"{weight}_scales"


def decode_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns fp32 weights [..., 32 g] from blocks [..., g, 16] and scales [..., g], both uint8.

    The lower four bits of a byte are the weight before the one of the upper four. An exponent of 255 gives weights that
    are not finite.
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)
    weights = values[pairs.long()].flatten(-2)
    return torch.ldexp(weights, scales.int().unsqueeze(-1) - _BIAS).flatten(-2)
