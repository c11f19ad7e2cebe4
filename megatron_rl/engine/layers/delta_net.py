"""Gated delta networks over packed sequences (THD) in plain PyTorch [2412.06464].

Shapes: T packed tokens of this rank, K key heads of width D and V value heads of width E of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.engine.layers.attention_plan import PlannedSequences
from megatron_rl.engine.layers.chunk_plan import ChunkPlan
from megatron_rl.engine.layers.delta_rule import chunked_delta_rule
from megatron_rl.engine.layers.norms import normalised
from megatron_rl.models.architecture import DeltaNet


class GatedDeltaNet(MegatronModule):
    """Stands in a transformer layer where self-attention would.

    Tensor parallelism cuts it by key heads, each with its value heads. Under context parallelism every rank gathers the
    projected tokens of all and computes the whole sequences; it keeps its own tokens, and the gather's backward pass
    adds up what each rank's tokens say of the others. Computation is so repeated on each of these ranks.

    Weights are in the dtype of the model; decay, norms and state are fp32.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, net: DeltaNet, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        ranks = pg_collection.tp.size()
        self.key_heads, self.per_key = net.key_heads // ranks, net.values_per_key
        self.key_dim, self.value_dim, self.kernel = net.key_dim, net.value_dim, net.kernel
        keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
        common = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": pg_collection.tp}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size, 2 * (keys + values + net.value_heads), gather_output=False, **common
        )
        self.out_proj = RowParallelLinear(
            values, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **common
        )
        self.conv_weight = _shard(config, (2 * keys + values) // ranks, 1, net.kernel)
        self.dt_bias = _shard(config, net.value_heads // ranks)
        self.A_log = _shard(config, net.value_heads // ranks)
        self.norm = GatedNorm(config, net.value_dim)
        self._recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, packed_seq_params: PlannedSequences, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [T / tensor-parallel ranks, 1, hidden]; returns its like and, in place of a bias, None."""
        plan = packed_seq_params.chunks(self.kernel - 1)
        projected = self.in_proj(hidden_states)[0].squeeze(1).unflatten(-1, (self.key_heads, -1))
        values = self.per_key * self.value_dim
        query, key, value, gate, beta, step = projected.split(
            (self.key_dim, self.key_dim, values, values, self.per_key, self.per_key), dim=-1
        )
        # The convolution's channels are all queries, then all keys, then all values.
        mixed = torch.cat([x.flatten(1) for x in (query, key, value, beta, step)], dim=-1)

        def mix(mixed: Tensor) -> Tensor:
            return self._mix(mixed, plan)

        recomputes = self._recomputes and self.training
        output = tensor_parallel.checkpoint(mix, False, mixed) if recomputes else mix(mixed)
        output = self.norm(output, gate.reshape(output.shape))
        return self.out_proj(output.flatten(1).unsqueeze(1))

    def _mix(self, mixed: Tensor, plan: ChunkPlan) -> Tensor:
        """mixed [T, 2 K D + V E + 2 V] -> [T, V, E]."""
        if self.cp_group.size() > 1:
            mixed = gather_from_sequence_parallel_region(mixed, group=self.cp_group)
        chunks = mixed.index_select(0, plan.rows.flatten()).view(*plan.rows.shape, -1)
        chunks = chunks.masked_fill(~plan.real.unsqueeze(-1), 0)
        heads, before = self.key_heads * self.per_key, self.kernel - 1
        channels, beta, step = chunks.split((len(self.conv_weight), heads, heads), dim=-1)
        query, key, value = self._convolve(channels)
        decay = -self.A_log.float().exp() * F.softplus(step[:, before:].float() + self.dt_bias)
        output = chunked_delta_rule(
            self._unit(query) * self.key_dim**-0.5,
            self._unit(key),
            value.float().transpose(1, 2),
            decay.transpose(1, 2),
            beta[:, before:].sigmoid().float().transpose(1, 2),
            plan.steps,
        )
        return output.transpose(1, 2).flatten(0, 1).index_select(0, plan.order).to(mixed.dtype)

    def _convolve(self, channels: Tensor) -> tuple[Tensor, ...]:
        """channels [N, before + C, 2 K D + V E] -> query and key [N, C, K, D] and value [N, C, V, E]."""
        convolved = F.silu(F.conv1d(channels.mT, self.conv_weight, groups=len(self.conv_weight))).mT
        keys = self.key_heads * self.key_dim
        query, key, value = convolved.split((keys, keys, convolved.shape[-1] - 2 * keys), dim=-1)
        widths = (self.key_dim, self.key_dim, self.value_dim)
        return tuple(x.unflatten(-1, (-1, width)) for x, width in zip((query, key, value), widths, strict=True))

    def _unit(self, x: Tensor) -> Tensor:
        """x [N, C, K, D] -> [N, V, C, D] of length 1, in fp32: a key head serves consecutive value heads."""
        x = x.float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self.per_key, dim=2).transpose(1, 2)


class GatedNorm(torch.nn.Module):
    """Root-mean-square norm in fp32 over each head, times its weight and the SiLU of a gate."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=device))
        # Each tensor-parallel rank sees other heads: Megatron sums such gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., width]."""
        normed = normalised(x.float(), self.eps).to(x.dtype)
        return (normed * self.weight * F.silu(gate.float())).to(x.dtype)


def _shard(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    """A weight that is cut over tensor-parallel ranks along its first dimension."""
    weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
    return weight
