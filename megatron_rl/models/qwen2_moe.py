"""Qwen1.5-MoE and Qwen2-MoE: biases on queries, keys and values, and an expert with a gate that every token visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, Router
from megatron_rl.models.decoder_fields import read_decoder, read_dense_layers, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen2_moe"
CAUSAL_LM = "Qwen2MoeForCausalLM"
VALUE_MODEL = "Qwen2MoeForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()

NAMES = blocks.Names(shared="mlp.shared_expert")


def read(fields: JsonFields) -> Architecture:
    decoder = read_decoder(fields, MODEL_TYPE)
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        qkv_bias=fields.boolean("qkv_bias", True),
        expert_hidden_size=fields.integer("moe_intermediate_size"),
        dense_layers=read_dense_layers(fields, decoder.num_layers),
        router=Router(pre_softmax=not fields.boolean("norm_topk_prob", False)),
        shared_hidden_size=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch, NAMES)


def server_caveats(arch: Architecture) -> Iterator[str]:
    if arch.dense_layers:
        # SGLang 0.5.23 passes mlp_only_layers and decoder_sparse_step over.
        yield f"layers {list(arch.dense_layers)} are dense, but SGLang's {MODEL_TYPE} has experts in every layer"
