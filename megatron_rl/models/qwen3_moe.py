"""Qwen3-MoE: Qwen3 with a router and experts in most layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, read_decoder
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen3_moe"
CAUSAL_LM = "Qwen3MoeForCausalLM"
VALUE_MODEL = "Qwen3MoeForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {
    # Qwen3-Coder's config.json has these.
    "qkv_bias": (False,),
    "shared_expert_intermediate_size": (0,),
    "use_qk_norm": (True,),
}
UNUSED = (r".*\.rotary_emb\.inv_freq",)

MAX_EXPERTS = 4_096  # lists as long as this are made of a model's experts; today's widest has 512


def read(fields: JsonFields) -> Architecture:
    # transformers and SGLang both derive head_dim so.
    decoder = read_decoder(fields, MODEL_TYPE, qk_norm=True, derives_head_dim=True)
    num_experts = _num_experts(fields)
    experts_per_token = fields.integer("num_experts_per_tok")
    if experts_per_token > num_experts:
        raise fields.error("num_experts_per_tok", experts_per_token, f"at most num_experts = {num_experts}")
    return dataclasses.replace(
        decoder,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_hidden_size=fields.integer("moe_intermediate_size"),
        dense_layers=_dense_layers(fields, decoder.num_layers),
        # Softmax over the chosen scores is softmax over all, then normalised over the chosen.
        pre_softmax=not fields.boolean("norm_topk_prob"),
    )


def _num_experts(fields: JsonFields) -> int:
    # transformers 5 writes num_local_experts, earlier versions num_experts.
    names = [name for name in ("num_experts", "num_local_experts") if name in fields.left]
    counts = {fields.integer(name, largest=MAX_EXPERTS) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise fields.error("num_experts", sorted(counts), "the same number as num_local_experts")
    return counts.pop()


def _dense_layers(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    step = fields.integer("decoder_sparse_step", 1)
    mlp_only = fields.left.pop("mlp_only_layers", None) or []
    if not isinstance(mlp_only, list) or any(type(n) is not int or not 0 <= n < num_layers for n in mlp_only):
        raise fields.error("mlp_only_layers", mlp_only, f"a list of layer numbers from 0 to {num_layers - 1}")
    return tuple(n for n in range(num_layers) if n in mlp_only or (n + 1) % step)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> Iterator[str]:
    if arch.dense_layers:
        # SGLang 0.5.23 passes mlp_only_layers over: those layers would have experts with random weights.
        yield f"layers {list(arch.dense_layers)} are dense, but SGLang's {MODEL_TYPE} has experts in every layer"
