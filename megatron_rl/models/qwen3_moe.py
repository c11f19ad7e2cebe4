"""Qwen3-MoE: Qwen3 with a router and experts in most layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, Router
from megatron_rl.models.decoder_fields import read_decoder, read_dense_layers, read_experts
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
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    # transformers and SGLang both derive head_dim so.
    decoder = read_decoder(fields, MODEL_TYPE, qk_norm="head")
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        expert_hidden_size=fields.integer("moe_intermediate_size"),
        dense_layers=read_dense_layers(fields, decoder.num_layers),
        # Softmax over the chosen scores is softmax over all, then normalised over the chosen.
        router=Router(pre_softmax=not fields.boolean("norm_topk_prob")),
    )


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> Iterator[str]:
    if arch.dense_layers:
        # SGLang 0.5.23 passes mlp_only_layers over: those layers would have experts with random weights.
        yield f"layers {list(arch.dense_layers)} are dense, but SGLang's {MODEL_TYPE} has experts in every layer"
