"""Attention over packed sequences (THD) in plain PyTorch: grouped queries, and latent attention.

Shapes: T packed tokens of this rank, N query heads and G key-value heads of this tensor-parallel rank, D head width, V
value width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rl.engine.layers.attention_plan import PlannedSequences
from megatron_rl.engine.layers.rotary import Turns, pairs_to_halves
from megatron_rl.models.architecture import Architecture


class RotatedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, except that PlannedSequences apply the rotary embedding."""

    def __init__(self, config: TransformerConfig, *args: Any, arch: Architecture, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._turns = Turns.of(arch)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor,
        packed_seq_params: PlannedSequences,
        **kwargs: Any,
    ) -> Any:
        packed_seq_params.turn(self._turns)
        self._sequences: PlannedSequences | None = packed_seq_params  # for this call alone: it holds masks
        try:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._sequences = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._sequences is not None
        return self._sequences.rotate(query), self._sequences.rotate(key), *rest


class GatedSelfAttention(RotatedSelfAttention):
    """Self-attention whose output is multiplied by a sigmoid of the token, before the output projection.

    In the weight each query head is followed by its gate, as in the files. Megatron-Core's own has all gates of a
    key-value head behind its queries, and does not cut them if ranks share that head (0.16.1).
    """

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Returns query [T, 1, N, D], key and value [T, 1, G, D], and the gate [T, 1, N, D]; hidden_states
        [T / tensor-parallel ranks, 1, hidden]."""
        mixed, _ = self.linear_qkv(hidden_states)
        width, groups = self.hidden_size_per_attention_head, self.config.num_query_groups
        sharing = max(self.world_size // groups, 1)  # ranks that have the same key-value head
        if sharing > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.tp_group)
            mixed = mixed.chunk(groups, dim=-1)[self.tp_group.rank() // sharing]
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        gated, key, value = mixed.split((mixed.shape[-1] - 2 * width, width, width), dim=-1)
        gated = gated.flatten(-2).unflatten(-1, (-1, 2 * width))
        gated = gated.chunk(sharing, dim=-2)[self.tp_group.rank() % sharing]
        query, gate = gated.chunk(2, dim=-1)
        assert self._sequences is not None
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        return self._sequences.rotate(query), self._sequences.rotate(key), value, gate


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, for its own tokens: weight [out, in]."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        shape, device = (outputs, inputs), torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # Each tensor-parallel rank sees other tokens: Megatron sums such gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., in]; returns [..., out] and, as Megatron-Core's layers do, a bias: none."""
        return F.linear(x, self.weight), None


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's latent attention with whole down-projections, as Transformer Engine has them.

    Its own are cut over tensor-parallel ranks if Transformer Engine is not there. Then the gradient of the one rotated
    key lacks the other ranks' heads (megatron-core 0.16.1 and 0.19.2).
    """

    def __init__(
        self, config: MLATransformerConfig, *args: Any, arch: Architecture, norm: Callable[..., Any], **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self._turns = Turns.of(arch)
        # Made here, because megatron-core 0.19 takes norms of latents with fused linear layers only, or with both.
        self.kv_layernorm = norm(config, config.kv_lora_rank, eps=config.layernorm_epsilon)
        if config.q_lora_rank is not None:
            self.q_layernorm = norm(config, config.q_lora_rank, eps=config.layernorm_epsilon)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, width)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None,
        position_ids: None,
        packed_seq_params: PlannedSequences,
        **_: Any,
    ) -> tuple[Tensor | None, ...]:
        """Returns query and key [T, N, D], value [T, N, V] and, in place of the latents, which only sparse attention
        reads, None twice; hidden_states [T / tensor-parallel ranks, 1, hidden]."""
        config = self.config
        parts = config.qk_head_dim, config.qk_pos_emb_head_dim
        query = self._query(hidden_states).unflatten(-1, (-1, self.q_head_dim))
        down = self.linear_kv_down_proj(hidden_states)[0]
        latent, turning = down.split((config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1)
        if config.sequence_parallel:
            turning = gather_from_sequence_parallel_region(turning, group=self.tp_group)
        up = self.linear_kv_up_proj(self.kv_layernorm(latent))[0]
        key, value = up.unflatten(-1, (-1, config.qk_head_dim + config.v_head_dim)).split(
            (config.qk_head_dim, config.v_head_dim), dim=-1
        )
        packed_seq_params.turn(self._turns)
        fixed, turned = query.split(parts, dim=-1)
        turned = packed_seq_params.rotate(pairs_to_halves(turned))
        shared = packed_seq_params.rotate(pairs_to_halves(turning).unsqueeze(-2)).expand(*key.shape[:-1], -1)
        query, key = torch.cat((fixed, turned), dim=-1), torch.cat((key, shared), dim=-1)
        return query.squeeze(1), key.squeeze(1), value.squeeze(1), None, None

    def _query(self, hidden_states: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(hidden_states)[0]
        latent = self.linear_q_down_proj(hidden_states)[0]
        return self.linear_q_up_proj(self.q_layernorm(latent))[0]


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences (THD), with all-gathered keys and values under context parallelism.

    Without context parallelism, windows and sinks a GPU has a kernel for it in bf16. Elsewhere sequences are batched by
    length class, so that none is padded to more than twice its own length.

    softmax_offset [N], if there are sinks: each head's extra logit. Megatron-Core and Transformer Engine call it so.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        arch: Architecture,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        self.window = arch.window_of(layer_number - 1)
        self.softmax_offset: torch.nn.Parameter | None = None
        if arch.sinks:
            heads, device = config.num_attention_heads // pg_collection.tp.size(), torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

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
        """query [T, N, D], key [T, G, D] and value [T, G, V]; returns [T, N * V]."""
        sinks = self.softmax_offset
        is_plain = self.cp_group.size() == 1 and self.window is None and sinks is None
        if is_plain and has_flash_attention(query, value):
            return flash_attention(query, key, value, packed_seq_params, self.softmax_scale)
        if self.cp_group.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        return padded_attention(query, key, value, packed_seq_params, self.softmax_scale, self.window, sinks)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PlannedSequences,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [T, N, D], key [T', G, D] and value [T', G, V] of all context-parallel ranks; returns [T, N * V].

    A token looks at the `window` last tokens, itself included; None: at all. sinks [N]: each head's extra logit.
    """
    plan, masks, outputs = sequences.attention, sequences.masks(window, sinks is not None), []
    for batch, mask in zip(plan.batches, masks, strict=True):
        q, k, v = _take(query, batch.queries), _take(key, batch.keys), _take(value, batch.keys)
        if sinks is not None:
            q, k, v = with_sinks(q, k, v, sinks / scale)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(-1, query.shape[1] * value.shape[2]))
    return torch.cat(outputs).index_select(0, plan.order)


def with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds one more key, whose product with head n's queries is sinks[n], and whose value is 0.

    So attention kernels, which know no sinks, compute the softmax over one logit more. The R heads of a group share the
    key: it has one element more for each of them, and a head's queries are 1 there and 0 at the others'.

    query [B, N, S, D], key [B, G, S', D], value [B, G, S', V] and sinks [N], head n of group n // R; returns
    [B, N, S, D + R], [B, G, S' + 1, D + R] and [B, G, S' + 1, V].
    """
    (batch, groups, _, width), heads = key.shape, len(sinks) // key.shape[1]
    own = torch.eye(heads, dtype=query.dtype, device=query.device).repeat(groups, 1)[:, None]
    query = torch.cat((query, own.expand(batch, -1, query.shape[2], -1)), dim=-1)
    sink = F.pad(sinks.view(groups, 1, heads), (width, 0)).expand(batch, -1, -1, -1)
    return query, torch.cat((F.pad(key, (0, heads)), sink), dim=2), F.pad(value, (0, 0, 0, 1))


def has_flash_attention(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    if not query.is_cuda or query.dtype != torch.bfloat16 or width != value.shape[-1]:
        return False
    return width % 8 == 0 and width <= 256


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
