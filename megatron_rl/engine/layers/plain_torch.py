"""Transformer layers in plain PyTorch, if Transformer Engine is not installed or not wanted.

They fill the places that Megatron-Core's local modules leave empty: a norm under sequence parallelism (norms.py),
packed attention with context parallelism (attention.py), and grouped experts. Linear layers, the router, the
dispatcher and the transformer layer itself are Megatron-Core's own, except for the order of tokens by expert
(permutation.py) and where the rotary embedding is applied. Weights have the same values and the same Hugging Face names
as with Transformer Engine.

Shapes: T packed tokens of this rank, H hidden, N query heads and G key-value heads of this tensor-parallel rank, D head
width, E experts of this rank, F expert width on this expert-tensor-parallel rank.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
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
from megatron_rl.engine.layers.attention import (
    GatedSelfAttention,
    LatentSelfAttention,
    PackedAttention,
    RotatedSelfAttention,
)
from megatron_rl.engine.layers.attention_plan import PlannedSequences, attention_plan
from megatron_rl.engine.layers.chunk_plan import chunk_plan
from megatron_rl.engine.layers.delta_net import GatedDeltaNet
from megatron_rl.engine.layers.norms import AllHeadsNorm, RMSNorm
from megatron_rl.engine.layers.permutation import use_equal_bits
from megatron_rl.engine.layers.provider import sequence_bounds
from megatron_rl.models.architecture import Architecture, ClampedSwiglu


class SharedExpert(SharedExpertMLP):
    """Megatron-Core's, with the arguments that all its versions agree on."""

    def __init__(self, config: TransformerConfig, gate: bool, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config, _mlp_parts(), gate=gate, pg_collection=pg_collection)


class GroupedExperts(MegatronModule):
    """The gated experts of this rank as two stacked weights, one grouped matrix product each.

    weight1 [E, 2F, H]: gate, then up; weight2 [E, H, F]. Communication over expert-tensor parallelism is the
    dispatcher's: it gathers the input tokens and reduces the output.

    bias1 [E, 2F] and bias2 [E, H / expert-tensor ranks], if the experts have biases. Each rank adds its own stretch of
    the second to the output, so that the sum over ranks has it once.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: Any = None,
        *,
        arch: Architecture,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.clamped = arch.clamped
        ranks, hidden = pg_collection.expt_tp.size(), config.hidden_size
        ffn = config.moe_ffn_hidden_size // ranks
        self.own_outputs = pg_collection.expt_tp.rank() * (hidden // ranks)
        shapes: dict[str, tuple[int, ...]] = {
            "weight1": (num_local_experts, 2 * ffn, hidden),
            "weight2": (num_local_experts, hidden, ffn),
        }
        if arch.biases:
            shapes |= {"bias1": (num_local_experts, 2 * ffn), "bias2": (num_local_experts, hidden // ranks)}
        for name, shape in shapes.items():
            # Values come from a Hugging Face checkpoint; there is no initialisation to keep equal across layouts.
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            self.register_parameter(name, weight)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x [n, H] sorted by expert, tokens_per_expert [E], probs [n] of the router; returns ([n, H], None)."""
        gate_up = grouped_linear(x, self.weight1, tokens_per_expert)
        if hasattr(self, "bias1"):
            gate_up = gate_up + rows_of(self.bias1, tokens_per_expert, len(x))
        if self.clamped is None:
            hidden = _WeightedSwiglu.apply(gate_up, probs)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            activated = clamped_swiglu(gate, up, self.clamped)
            hidden = (activated * probs.unsqueeze(-1)).to(x.dtype)
        output = grouped_linear(hidden, self.weight2, tokens_per_expert)
        if hasattr(self, "bias2"):
            bias = (rows_of(self.bias2, tokens_per_expert, len(x)) * probs.unsqueeze(-1)).to(x.dtype)
            after = output.shape[-1] - self.own_outputs - bias.shape[-1]
            output = output + F.pad(bias, (self.own_outputs, after))
        return output, None


class _WeightedSwiglu(torch.autograd.Function):
    """silu(gate) * up * probs, and gradients that go to their places; autograd would copy each half."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, probs)
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up) * probs.unsqueeze(-1)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        activated = F.silu(gate)
        weighted = (grads[0] * probs.unsqueeze(-1)).to(gate_up.dtype)
        torch.mul(weighted, activated, out=grad_up)
        grad_probs = (activated.mul_(up) * grads[0].to(probs.dtype)).sum(-1)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=grad_gate)
        return grad, grad_probs


def clamped_swiglu(gate: Tensor, up: Tensor, clamp: ClampedSwiglu) -> Tensor:
    """Returns what ClampedSwiglu says, of the shape and dtype of gate and up."""
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (up + 1) * gate * torch.sigmoid(clamp.alpha * gate)


def rows_of(bias: Tensor, rows: Tensor, count: int) -> Tensor:
    """bias [E, out], rows [E] with the sum `count`; returns [count, out]: expert e's bias rows[e] times."""
    return bias.repeat_interleave(put(rows, bias.device), dim=0, output_size=count)


def grouped_linear(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """x [n, in] in consecutive blocks of rows[e] rows, weight [E, out, in]; returns [n, out].

    torch's grouped_mm is used where it has a grouped kernel (CUDA, bf16); elsewhere it loops over the groups too, and
    more slowly (measured with torch 2.13 on CPU).
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=put(rows.cumsum(0, dtype=torch.int32), x.device))
    output: Tensor = _BlocksLinear.apply(x, weight, rows.tolist())
    return output


class _BlocksLinear(torch.autograd.Function):
    """One matrix product for each block, written to its place; concatenating would copy outputs and gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        output = x.new_empty(len(x), weight.shape[1])
        for block, w, out in zip(x.split(rows), weight, output.split(rows), strict=True):
            torch.mm(block, w.t(), out=out)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        blocks = grads[0].split(ctx.rows)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for block, w, out in zip(blocks, weight, grad_x.split(ctx.rows), strict=True):
                torch.mm(block, w, out=out)
        if ctx.needs_input_grad[1]:  # not if experts are frozen
            grad_weight = torch.empty_like(weight)
            for block, rows, out in zip(blocks, x.split(ctx.rows), grad_weight, strict=True):
                torch.mm(block.t(), rows, out=out)
        return grad_x, grad_weight, None


def layer_spec(arch: Architecture, layer: int) -> ModuleSpec:
    """Describes transformer layer `layer` (0-based, global), dense or with experts."""
    if arch.is_moe(layer):
        shared = SharedExpert if arch.shared_hidden_size else None
        experts = ModuleSpec(module=GroupedExperts, params={"arch": arch})
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))
    else:
        mlp = ModuleSpec(module=MLP, submodules=_mlp_parts())
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_mixer(arch, layer),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mixer(arch: Architecture, layer: int) -> ModuleSpec:
    if arch.has_delta_net(layer):
        return ModuleSpec(module=GatedDeltaNet, params={"net": arch.delta_net})
    return _latent_attention(arch) if arch.latent else _attention(arch)


def _attention(arch: Architecture) -> ModuleSpec:
    return ModuleSpec(
        module=GatedSelfAttention if arch.output_gate else RotatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal, "arch": arch},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=PackedAttention, params={"arch": arch}),
            linear_proj=RowParallelLinear,
            q_layernorm=_head_norm(arch, arch.num_heads),
            k_layernorm=_head_norm(arch, arch.num_kv_heads),
        ),
    )


def _latent_attention(arch: Architecture) -> ModuleSpec:
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal, "arch": arch, "norm": RMSNorm},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ModuleSpec(module=PackedAttention, params={"arch": arch}),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,  # see LatentSelfAttention
            kv_layernorm=IdentityOp,
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
        chunked = functools.partial(chunk_plan, cu_seqlens, cp, cp_rank, device)
        return PlannedSequences(**sequence_bounds(cu_seqlens, device), attention=plan, chunked=chunked)

    def weight_names(self, name: str, experts: range) -> Iterator[tuple[str, int | None]]:
        stacked = re.fullmatch(r"mlp\.experts\.(weight|bias)([12])", name)
        if stacked is None:
            yield name, None
            return
        for row, expert in enumerate(experts):
            yield f"mlp.experts.linear_fc{stacked[2]}.{stacked[1]}{expert}", row
