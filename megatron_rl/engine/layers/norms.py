"""Norms in plain PyTorch, in fp32, under sequence and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in fp32, over the last dimension; its weight is shared under sequence parallelism.

    If the configuration has layernorm_zero_centered_gamma, it multiplies by 1 + weight, in fp32: 1 plus a small number
    is not that number in bf16.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.is_zero_centred = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tensor-parallel rank sees other tokens (or other heads): Megatron sums such gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = normalised(x.float(), self.eps)
        if self.is_zero_centred:
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


def normalised(x: Tensor, eps: float) -> Tensor:
    """Divides x [..., H], fp32, by the root of eps and the mean of its squares."""
    normed: Tensor = _Normalised.apply(x, eps)
    return normed


class _Normalised(torch.autograd.Function):
    """Equals torch's rms_norm on a CPU in all bits. That is made of ten operations, and keeps its input too; this keeps
    its output alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], normed).unsqueeze(-1).div_(normed.shape[-1])
        return torch.addcmul(grads[0], normed, along, value=-1).mul_(scale), None


class AllHeadsNorm(torch.nn.Module):
    """Root-mean-square norm in fp32 over the heads of all tensor-parallel ranks together.

    Each rank holds the whole weight [all heads * D] and uses its own heads' part: Megatron-Core adds up over the ranks
    the gradients of whatever is called q_layernorm or k_layernorm. With more ranks than key-value heads several
    consecutive ranks have the same head.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., heads of this rank, D]."""
        mine = x.float().flatten(-2)
        width, ranks = mine.shape[-1], parallel_state.get_tensor_model_parallel_world_size()
        copies = ranks * width // len(self.weight)
        squares = reduce_from_tensor_model_parallel_region(mine.square().sum(-1, keepdim=True) / copies)
        squares = copy_to_tensor_model_parallel_region(squares)  # each rank's heads depend on the sum
        normed = (mine * torch.rsqrt(squares / len(self.weight) + self.eps)).to(x.dtype)
        first = parallel_state.get_tensor_model_parallel_rank() // copies * width
        return (normed * self.weight[first : first + width]).view_as(x)
