"""Mixtral: grouped-query attention without norms on heads, and experts in every layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_decoder, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "mixtral"
CAUSAL_LM = "MixtralForCausalLM"
VALUE_MODEL = "MixtralForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {"router_jitter_noise": (0.0, 0)}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()

NAMES = blocks.Names(
    gate_up_down=("w1", "w3", "w2"), router="block_sparse_moe.gate", experts="block_sparse_moe.experts"
)


def read(fields: JsonFields) -> Architecture:
    fields.must_be("sliding_window", None)
    decoder = read_decoder(fields, MODEL_TYPE)
    return dataclasses.replace(decoder, **read_experts(fields), expert_hidden_size=decoder.ffn_hidden_size)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch, NAMES)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
