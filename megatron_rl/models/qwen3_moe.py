"""Qwen3-MoE: Qwen3 with a router and experts in most layers."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.models import qwen3
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weight import COLUMNS, GATE_UP, REPLICATED, Family, Source, Weight


def weights(arch: Architecture) -> list[Weight]:
    found = list(qwen3.embedding(arch))
    for layer in range(arch.num_layers):
        found += qwen3.attention(arch, layer)
        found += experts(arch, layer) if arch.is_moe(layer) else qwen3.dense_mlp(arch, layer)
    return [*found, *qwen3.head(arch)]


def experts(arch: Architecture, layer: int) -> Iterator[Weight]:
    mcore, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    ffn, hidden = arch.expert_hidden_size, arch.hidden_size
    gate = Source(f"{hf}.gate.weight", (arch.num_experts, hidden))
    yield Weight(f"{mcore}.router.weight", (gate,), REPLICATED, layer)
    for expert in range(arch.num_experts):
        own = f"{hf}.experts.{expert}"
        gate_up = tuple(Source(f"{own}.{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
        yield Weight(f"{mcore}.experts.linear_fc1.weight{expert}", gate_up, GATE_UP, layer, expert)
        down = Source(f"{own}.down_proj.weight", (hidden, ffn))
        yield Weight(f"{mcore}.experts.linear_fc2.weight{expert}", (down,), COLUMNS, layer, expert)


FAMILY = Family(weights, qwen3.FAMILY.unused)
