"""CPU implementations of the Transformer Engine functions that Megatron-Core calls.

Each body has Transformer Engine's argument names; arguments in `**_` do not change the result here. Modules keep their
constructors, parameters and attributes: only `forward` is replaced.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install_kernels() -> None:
    """Must be called after the import of megatron.core, which holds some of the functions under its own names."""
    torch.cuda.is_available = lambda: True  # modules refuse to be built without
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    arange = torch.arange  # for Megatron-Core's dispatcher with fused permutation, which the CPU layer does not use
    torch.arange = lambda *args, device=None, **kwargs: arange(*args, **kwargs)
    import transformer_engine.pytorch as te
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.attention import rope
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    for module, forward in (
        (te.Linear, linear),
        (te.LayerNormLinear, norm_and_linear),
        (te.GroupedLinear, grouped_linear),
        (te.RMSNorm, rms_norm),
        (te.DotProductAttention, attention),
    ):
        module.forward = _bound(module.forward, forward)
    functions = {
        te.moe_permute: permute,
        te.moe_permute_with_probs: permute_with_probs,
        te.moe_unpermute: unpermute,
        te.moe_sort_chunks_by_index: sort_chunks,
        te.moe_sort_chunks_by_index_with_probs: sort_chunks_with_probs,
        rope.apply_rotary_pos_emb: rotate,
        general_gemm: gemm,
        extension.multi_tensor_l2norm: l2_norm,
        extension.multi_tensor_scale: scale,
        extension.multi_tensor_scale_tensor: scale,
        extension.multi_tensor_adam: adam,
        extension.multi_tensor_adam_param_remainder: adam_of_remainders,
    }
    stand_ins = {real: _bound(real, body) for real, body in functions.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core", "transformer_engine")):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in stand_ins:
                    setattr(module, attribute, stand_ins[value])


def _bound(real: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `body` with the signature of `real`, checked at each call; compiled functions have no signature."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def called(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return body(*call.args, **call.kwargs) if "args" in call.arguments else body(**call.arguments)

    return called


# ---- modules -------------------------------------------------------------------------------------------------------


def linear(self: Any, inp: Tensor, **_: Any) -> Tensor:
    return _leave(self, F.linear(_enter(self, inp), self.weight))


def norm_and_linear(self: Any, inp: Tensor, **_: Any) -> Tensor:
    assert self.normalization == "RMSNorm"
    return F.linear(_enter(self, _normed(inp, self.layer_norm_weight, self.eps)), self.weight)


def grouped_linear(self: Any, inp: Tensor, m_splits: Tensor | Sequence[int], **_: Any) -> Tensor:
    sizes = m_splits.tolist() if torch.is_tensor(m_splits) else list(m_splits)
    return torch.cat([F.linear(rows, getattr(self, f"weight{i}")) for i, rows in enumerate(inp.split(sizes))])


def rms_norm(self: Any, input: Tensor, **_: Any) -> Tensor:
    return _normed(input, self.weight, self.eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def _enter(module: Any, x: Tensor) -> Tensor:
    """Applies the input communication of a column-parallel linear layer."""
    from megatron.core.tensor_parallel import mappings

    if module.parallel_mode != "column" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, group=module.tp_group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=module.tp_group)


def _leave(module: Any, x: Tensor) -> Tensor:
    """Applies the output communication of a row-parallel linear layer."""
    from megatron.core.tensor_parallel import mappings

    if module.parallel_mode != "row" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x, group=module.tp_group)
    return mappings.reduce_from_tensor_model_parallel_region(x, group=module.tp_group)


def attention(
    self: Any,
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor,
    qkv_format: str,
    cu_seqlens_q: Tensor,
    attn_mask_type: str,
    **_: Any,
) -> Tensor:
    """Computes attention of packed sequences one by one: [T / cp, heads, D] -> [T / cp, heads * D].

    cu_seqlens_q are the bounds of whole sequences, in tokens. A rank's queries see the keys of all ranks.
    """
    assert (qkv_format, attn_mask_type, cu_seqlens_q.dtype) == ("thd", "padding_causal", torch.int32)
    cp, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
    lengths = cu_seqlens_q.diff().tolist()
    outputs = []
    for query, key, value, length in zip(
        query_layer.split([length // cp for length in lengths]),
        *(_whole_sequences(x, lengths, self.cp_group, cp) for x in (key_layer, value_layer)),
        lengths,
        strict=True,
    ):
        seen = torch.arange(length) <= _chunk_positions(length, cp, rank)[:, None]
        heads_first = (x.transpose(0, 1) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            *heads_first, attn_mask=seen, scale=self.fused_attention.softmax_scale, enable_gqa=True
        )
        outputs.append(output.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def _chunk_positions(length: int, cp: int, rank: int) -> Tensor:
    """Returns the positions [length / cp] of a rank's tokens in their sequence: two of its 2 * cp chunks, one from each
    end, as Transformer Engine's thd_get_partitioned_indices gives them."""
    chunks = torch.arange(length).chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if cp > 1 else torch.arange(length)


def _whole_sequences(x: Tensor, lengths: Sequence[int], group: Any, cp: int) -> Sequence[Tensor]:
    """Gathers x [T / cp, ...] of all ranks; returns [length, ...] of each sequence. Gradients are summed over ranks."""
    from megatron.core.tensor_parallel import mappings

    if cp == 1:
        return x.split(list(lengths))
    ranks = mappings.gather_from_sequence_parallel_region(x, group=group).chunk(cp)
    parts = zip(*(part.split([length // cp for length in lengths]) for part in ranks), strict=True)
    order = (torch.cat([_chunk_positions(length, cp, rank) for rank in range(cp)]).argsort() for length in lengths)
    return [torch.cat(part)[places] for part, places in zip(parts, order, strict=True)]


# ---- functions -----------------------------------------------------------------------------------------------------


def rotate(
    t: Tensor, freqs: Tensor, tensor_format: str, fused: bool, cu_seqlens: Tensor, cp_size: int, cp_rank: int, **_: Any
) -> Tensor:
    assert (tensor_format, fused) == ("thd", True)
    positions = torch.cat([_chunk_positions(length, cp_size, cp_rank) for length in cu_seqlens.diff().tolist()])
    angles = freqs.flatten(1)[positions][:, None]
    first, second = t.float().chunk(2, dim=-1)
    return (t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(t.dtype)


def gemm(A: Tensor, B: Tensor, out_dtype: torch.dtype, layout: str, out: None, bias: None, **_: Any) -> list[Tensor]:
    """The router's matrix product. Column-major as in BLAS: operands are read from right to left."""
    assert out is None
    assert bias is None
    left, right = {"TN": (B, A.T), "NN": (B, A), "NT": (B.T, A)}[layout]
    return [left.to(out_dtype) @ right.to(out_dtype)]


def permute(inp: Tensor, routing_map: Tensor, map_type: str, **_: Any) -> tuple[Tensor, Tensor]:
    """Returns rows sorted by expert, and the input row of each."""
    assert map_type == "mask"
    rows = routing_map.bool().T.nonzero()[:, 1]
    return inp.index_select(0, rows), rows


def permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    permuted, rows = permute(inp, routing_map, "mask")
    assert len(rows) == num_out_tokens
    return permuted, probs.T.masked_select(routing_map.bool().T), rows


def unpermute(inp: Tensor, row_id_map: Tensor, merging_probs: None, restore_shape: torch.Size, **_: Any) -> Tensor:
    assert merging_probs is None
    return inp.new_zeros(restore_shape, dtype=torch.float32).index_add(0, row_id_map, inp.float()).to(inp.dtype)


def sort_chunks(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    chunks = inp.split(split_sizes.flatten().tolist())
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def sort_chunks_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    return sort_chunks(inp, split_sizes, sorted_index), sort_chunks(probs, split_sizes, sorted_index)


# ---- compiled functions, by position --------------------------------------------------------------------------------


def l2_norm(chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    assert not per_tensor
    return torch.stack([t.float().square().sum() for t in tensors[0]]).sum().sqrt()[None], None


def scale(chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], factor: float | Tensor) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


def adam(
    chunk: int,
    overflow: Tensor,
    tensors: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    weight_decay: float,
) -> None:
    """Steps fp32 weights; moments may be in bf16."""
    assert decoupled
    assert bias_correction
    for given, weight, mean, square in zip(*tensors, strict=True):
        assert weight.dtype == torch.float32
        gradient = given.float()
        first = mean.float().lerp_(gradient, 1 - beta1)
        second = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        weight.sub_(lr * (update + weight_decay * weight))
        mean.copy_(first)
        square.copy_(second)


def adam_of_remainders(chunk: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], *rest: Any) -> None:
    """Steps bf16 weights with the lower halves of fp32 ones. The upper half of one whose lower half is negative as an
    int16 has been rounded up."""
    gradients, weights, means, squares, lower = tensors
    whole = []
    for weight, low in zip(weights, lower, strict=True):
        halves = torch.stack([low, weight.view(torch.int16) - (low < 0).short()], dim=-1)  # as they lie in memory
        whole.append(halves.contiguous().view(torch.float32).squeeze(-1))
    adam(chunk, overflow, [gradients, whole, means, squares], *rest)
    for full, weight, low in zip(whole, weights, lower, strict=True):
        first, second = full.unsqueeze(-1).view(torch.int16).unbind(-1)
        low.copy_(first)
        weight.view(torch.int16).copy_(second + (first < 0).short())
