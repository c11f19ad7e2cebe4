"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on queries, keys and values, and a gated MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_decoder
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen2"
CAUSAL_LM = "Qwen2ForCausalLM"
VALUE_MODEL = "Qwen2ForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    return dataclasses.replace(read_decoder(fields, MODEL_TYPE), qkv_bias=True)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
