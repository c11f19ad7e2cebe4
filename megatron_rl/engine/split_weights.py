"""fp32 weights as FusedAdam keeps them (optim.moments_dtype): bf16, and the last 16 bits beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def join_weight(rounded: Tensor, rest: Tensor) -> Tensor:
    """Returns the fp32 weights of which FusedAdam keeps bf16 and the last 16 bits. bf16 is rounded to the nearest, and
    up if the first of these bits is set."""
    upper = rounded.view(torch.int16).to(torch.int32) - (rest < 0).to(torch.int32)
    return ((upper << 16) | (rest.to(torch.int32) & 0xFFFF)).view(torch.float32)


def split_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bf16 weights and int16 bits of which `join_weight` makes the fp32 weights again."""
    bits = weight.view(torch.int32)
    rest = bits.to(torch.int16)  # keeps the last 16 bits
    return ((bits >> 16) + (rest < 0).to(torch.int32)).to(torch.int16).view(torch.bfloat16), rest
