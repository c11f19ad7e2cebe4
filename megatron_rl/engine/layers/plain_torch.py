"""Transformer layers in plain PyTorch, if Transformer Engine is not installed or not wanted.

They fill the places that Megatron-Core's local modules leave empty: a norm under sequence parallelism, packed attention
(THD) with context parallelism, and grouped experts. Linear layers, the router, the dispatcher and the transformer layer
itself are Megatron-Core's own, except for the order of tokens by expert (permutation.py) and where the rotary embedding
is applied. Weights have the same values and the same Hugging Face names as with Transformer Engine.

Shapes: T packed tokens of this rank, H hidden, N query heads and G key-value heads of this tensor-parallel rank, D head
width, E experts of this rank, F expert width on this expert-tensor-parallel rank.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_rl.engine.device import put
from megatron_rl.engine.layers.attention_plan import AttentionPlan, PlannedSequences, attention_plan
from megatron_rl.engine.layers.permutation import use_equal_bits
from megatron_rl.engine.layers.provider import sequence_bounds
from megatron_rl.models.architecture import Architecture


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in fp32, over the last dimension; its weight is shared under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tensor-parallel rank sees other tokens (or other heads): Megatron sums such gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)
        return normed * self.weight


class AllHeadsNorm(torch.nn.Module):
    """Root-mean-square norm in fp32 over the heads of all tensor-parallel ranks together.

    Each rank holds the whole weight [all heads * D] and uses its own heads' part: Megatron-Core adds up over the ranks
    the gradients of whatever is called q_layernorm or k_layernorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., heads of this rank, D]."""
        mine = x.float().flatten(-2)
        squares = reduce_from_tensor_model_parallel_region(mine.square().sum(-1, keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)  # each rank's heads depend on the sum
        normed = (mine * torch.rsqrt(squares / len(self.weight) + self.eps)).to(x.dtype)
        first = parallel_state.get_tensor_model_parallel_rank() * mine.shape[-1]
        return (normed * self.weight[first : first + mine.shape[-1]]).view_as(x)


class SharedExpert(SharedExpertMLP):
    """Megatron-Core's, with the arguments that all its versions agree on."""

    def __init__(self, config: TransformerConfig, gate: bool, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config, _mlp_parts(), gate=gate, pg_collection=pg_collection)


class RotatedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, except that PlannedSequences apply the rotary embedding."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor,
        packed_seq_params: PlannedSequences,
        **kwargs: Any,
    ) -> Any:
        packed_seq_params.turn(rotary_pos_emb)
        self._sequences: PlannedSequences | None = packed_seq_params  # for this call alone: it holds masks
        try:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._sequences = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._sequences is not None
        return self._sequences.rotate(query), self._sequences.rotate(key), *rest


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences (THD), with all-gathered keys and values under context parallelism.

    Without context parallelism a GPU has a kernel for it in bf16. Elsewhere sequences are batched by length class, so
    that none is padded to more than twice its own length.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PlannedSequences,
        **_: Any,
    ) -> Tensor:
        """query [T, N, D], key and value [T, G, D]; returns [T, N * D]."""
        if self.cp_group.size() == 1 and has_flash_attention(query):
            return flash_attention(query, key, value, packed_seq_params, self.softmax_scale)
        if self.cp_group.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        return padded_attention(query, key, value, packed_seq_params.attention, self.softmax_scale)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """query [T, N, D], key and value [T', G, D] of all context-parallel ranks; returns [T, N * D]."""
    outputs = []
    for batch in plan.batches:
        out = F.scaled_dot_product_attention(
            _take(query, batch.queries),
            _take(key, batch.keys),
            _take(value, batch.keys),
            attn_mask=batch.mask,
            is_causal=batch.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[2]))
    return torch.cat(outputs).index_select(0, plan.order)


def has_flash_attention(query: Tensor) -> bool:
    width = query.shape[-1]
    return query.is_cuda and query.dtype == torch.bfloat16 and width % 8 == 0 and width <= 256


def flash_attention(query: Tensor, key: Tensor, value: Tensor, bounds: PackedSeqParams, scale: float) -> Tensor:
    """query [T, N, D], key and value [T, G, D], bf16 on a GPU; returns [T, N * D]."""
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, so only a GPU does it

    parameters = inspect.signature(varlen_attn).parameters
    # Between torch 2.10 and 2.13 the window replaced is_causal, and heads in groups came to be asked for.
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    if "scale" in parameters:
        options["scale"] = scale
    lengths = bounds.cu_seqlens_q, bounds.cu_seqlens_kv, bounds.max_seqlen_q, bounds.max_seqlen_kv
    output: Any = varlen_attn(query, key, value, *lengths, **options)  # with return_aux it would be a pair
    return output.flatten(1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, heads, D], rows [B, S] -> [B, heads, S, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)


class GroupedExperts(MegatronModule):
    """The gated experts of this rank as two stacked weights, one grouped matrix product each.

    weight1 [E, 2F, H]: gate, then up; weight2 [E, H, F]. Communication over expert-tensor parallelism is the
    dispatcher's: it gathers the input tokens and reduces the output.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        ffn = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        shapes = {
            "weight1": (num_local_experts, 2 * ffn, config.hidden_size),
            "weight2": (num_local_experts, config.hidden_size, ffn),
        }
        for name, shape in shapes.items():
            # Values come from a Hugging Face checkpoint; there is no initialisation to keep equal across layouts.
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            self.register_parameter(name, weight)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x [n, H] sorted by expert, tokens_per_expert [E], probs [n] of the router; returns ([n, H], None)."""
        gate, up = grouped_linear(x, self.weight1, tokens_per_expert).chunk(2, dim=-1)
        hidden = (F.silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype)
        return grouped_linear(hidden, self.weight2, tokens_per_expert), None


def grouped_linear(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """x [n, in] in consecutive blocks of rows[e] rows, weight [E, out, in]; returns [n, out].

    torch's grouped_mm is used where it has a grouped kernel (CUDA, bf16); elsewhere it loops over the groups as the
    line below does, and more slowly (measured with torch 2.13 on CPU).
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=put(rows.cumsum(0, dtype=torch.int32), x.device))
    blocks = x.split(rows.tolist())
    return torch.cat([F.linear(block, w) for block, w in zip(blocks, weight.unbind(0), strict=True)])


def layer_spec(arch: Architecture, layer: int) -> ModuleSpec:
    """Describes transformer layer `layer` (0-based, global), dense or with experts."""
    attention = ModuleSpec(
        module=RotatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=_head_norm(arch, arch.num_heads),
            k_layernorm=_head_norm(arch, arch.num_kv_heads),
        ),
    )
    if arch.is_moe(layer):
        shared = SharedExpert if arch.shared_hidden_size else None
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=GroupedExperts, shared_experts=shared))
    else:
        mlp = ModuleSpec(module=MLP, submodules=_mlp_parts())
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_parts() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _head_norm(arch: Architecture, heads: int) -> Any:
    """Describes the norm on queries or keys, which have so many heads over all ranks."""
    if arch.qk_norm == "all":
        return ModuleSpec(module=AllHeadsNorm, params={"heads": heads})
    return RMSNorm if arch.qk_norm == "head" else IdentityOp


class TorchLayers:
    """The LayerProvider of this file."""

    fused_kernels = False

    def block_spec(
        self, arch: Architecture, config: TransformerConfig, vp_stage: int | None
    ) -> TransformerBlockSubmodules:
        if config.moe_token_dispatcher_type == "alltoall":
            use_equal_bits()
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
        return TransformerBlockSubmodules(layer_specs=[layer_spec(arch, n) for n in numbers], layer_norm=RMSNorm)

    def packed_sequences(
        self, cu_seqlens: npt.NDArray[np.integer], cp: int, cp_rank: int, device: torch.device
    ) -> PlannedSequences:
        plan = attention_plan(cu_seqlens, cp, cp_rank, device)
        return PlannedSequences(**sequence_bounds(cu_seqlens, device), attention=plan)

    def weight_names(self, name: str, experts: range) -> Iterator[tuple[str, int | None]]:
        stacked = re.fullmatch(r"mlp\.experts\.weight([12])", name)
        if stacked is None:
            yield name, None
            return
        for row, expert in enumerate(experts):
            yield f"mlp.experts.linear_fc{stacked[1]}.weight{expert}", row
