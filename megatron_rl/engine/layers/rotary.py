"""Rotary position embedding of packed sequences in plain PyTorch: frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.models.architecture import Architecture, RampedRope, Yarn


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Returns radians per position [rotated width / 2], fp32 as transformers and SGLang compute them."""
    plain = 1 / (arch.rope_theta ** (torch.arange(0, arch.rotary_width, 2, dtype=torch.float32) / arch.rotary_width))
    match arch.rope_scaling:
        case Yarn() as yarn:
            return _yarn(plain, yarn, arch)
        case RampedRope() as ramped:
            return _ramped(plain, ramped)
    return plain


@dataclass(frozen=True, eq=False)
class Turns:
    """How a model's positions turn its heads: radians per position [W / 2] on the device, and what multiplies cosine
    and sine."""

    inverse: Tensor
    factor: float

    @classmethod
    def of(cls, arch: Architecture) -> Turns:
        factor = arch.rope_scaling.attention_factor if isinstance(arch.rope_scaling, Yarn) else 1.0
        return cls(inverse_frequencies(arch).to(torch.cuda.current_device()), factor)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine of positions [T], fp32 [T, 1, 1, W]."""
        angles = torch.outer(positions.float(), self.inverse).repeat(1, 2)[:, None, None]
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the first W of each head's elements; element i turns with i + W / 2.

    x [T, ..., heads, D]; cosine and sine [T, ..., 1, W] in its dtype, W at most D.
    """
    width = cosine.shape[-1]
    rotated: Tensor = _Rotated.apply(x[..., :width], cosine, sine)
    return torch.cat((rotated, x[..., width:]), dim=-1) if width < x.shape[-1] else rotated


class _Rotated(torch.autograd.Function):
    """Makes no copies of halves, as autograd would. The gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turned(grads[0], cosine, sine, -1), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    turned = x * cosine
    first, second = x.chunk(2, dim=-1)
    to_first, to_second = turned.chunk(2, dim=-1)
    half = sine[..., : sine.shape[-1] // 2]
    # Products are rounded before they are added, as Megatron-Core and transformers do: in bf16 it shows.
    to_first.sub_(second * half, alpha=sign)
    to_second.add_(first * half, alpha=sign)
    return turned


def pairs_to_halves(x: Tensor) -> Tensor:
    """Moves elements 0, 2, 4, ... of [..., W] before 1, 3, 5, ...: latent attention turns neighbours together."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def _yarn(plain: Tensor, yarn: Yarn, arch: Architecture) -> Tensor:
    """Returns interpolated low, unchanged high frequencies, and a ramp between them [YaRN 2309.00071, section 3.2]."""

    def place(turns: float) -> float:
        """Returns which pair of elements turns so often over the original length."""
        wave = yarn.original_length / (turns * 2 * math.pi)
        return arch.rotary_width * math.log(wave) / (2 * math.log(arch.rope_theta))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.rotary_width - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    share = ramp.clamp(0, 1)
    return plain / yarn.factor * share + plain * (1 - share)


def _ramped(plain: Tensor, scaling: RampedRope) -> Tensor:
    """As _yarn, with the ramp over the turns themselves (transformers, modeling_rope_utils)."""
    turns = scaling.original_length * plain / (2 * math.pi)
    kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    share = kept.clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain
