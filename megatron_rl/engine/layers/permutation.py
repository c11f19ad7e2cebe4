"""Megatron-Core's order of tokens by expert and back, such that two passes over the same tokens give the same bits.

Megatron-Core adds up a token's experts with scatter_add. On a GPU those are atomic additions, in any order, each
rounded to the dtype of the output: in bf16 two passes with the same weights differ, and so do the routes of the layers
that follow. Here each token gathers its rows, which are added in fp32 by number of expert. Transformer Engine's fused
kernels gather too.

Shapes: T tokens of H, k experts a token; n = k T rows, by expert; token_of [n] is the token of each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor


class _ToExperts(torch.autograd.Function):
    """tokens [T, H] -> rows [n, H]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of: Tensor) -> Tensor:
        ctx.save_for_backward(token_of)
        ctx.tokens = len(tokens)
        return tokens.index_select(0, token_of)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (token_of,) = ctx.saved_tensors
        return add_rows(grads[0], token_of, ctx.tokens), None


class _FromExperts(torch.autograd.Function):
    """rows [n, H] -> tokens [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token_of)
        return add_rows(rows, token_of, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_of,) = ctx.saved_tensors
        return grads[0].index_select(0, token_of), None, None


def add_rows(rows: Tensor, token_of: Tensor, tokens: int) -> Tensor:
    """Returns [T, H]: the sum of each token's rows. Every token has as many, as no token is dropped."""
    rows_of = token_of.argsort(stable=True).view(tokens, len(rows) // tokens)
    if rows.dtype == torch.float32:
        return F.embedding_bag(rows_of, rows, mode="sum")  # in one pass; in bf16 it would round each sum on a CPU
    total = rows.index_select(0, rows_of[:, 0]).float()
    for column in rows_of.unbind(1)[1:]:
        total += rows.index_select(0, column)
    return total.to(rows.dtype)


def use_equal_bits() -> None:
    """Replaces both directions of Megatron-Core's all-to-all dispatcher, except where they are fused, and leaves out
    its copies that change no order; once a process.

    Not for DeepEP's: there a token has as many rows as it has experts on this rank, which differ in number.
    """
    if hasattr(token_dispatcher, "_megatron_rl_permute"):
        return
    permute, unpermute, sort = (
        token_dispatcher.permute,
        token_dispatcher.unpermute,
        token_dispatcher.sort_chunks_by_idxs,
    )
    token_dispatcher._megatron_rl_permute = permute

    def to_experts(tokens: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused") or kwargs.get("drop_and_pad"):
            return permute(tokens, routing_map, *args, **kwargs)
        _, probs, token_of, *rest = permute(tokens[:, :0], routing_map, *args, **kwargs)
        return _ToExperts.apply(tokens, token_of), probs, token_of, *rest

    def from_experts(rows: Tensor, token_of: Tensor, restore_shape: torch.Size, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("fused") or kwargs.get("drop_and_pad") or kwargs.get("probs") is not None:
            return unpermute(rows, token_of, restore_shape, *args, **kwargs)
        return _FromExperts.apply(rows, token_of, restore_shape[0])

    def sort_chunks(rows: Tensor, sizes: Tensor, order: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused") or not np.array_equal(order.numpy(), np.arange(len(order))):  # `order` is on the host
            return sort(rows, sizes, order, *args, **kwargs)
        return rows, kwargs.get("probs")  # one rank has all experts: Megatron-Core would copy, in both passes

    token_dispatcher.permute, token_dispatcher.unpermute = to_experts, from_experts
    token_dispatcher.sort_chunks_by_idxs = sort_chunks
