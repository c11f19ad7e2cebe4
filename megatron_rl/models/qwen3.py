"""Qwen3, dense: grouped-query attention with a norm on each query and key head, and a gated MLP."""

from __future__ import annotations

from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_decoder
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen3"
CAUSAL_LM = "Qwen3ForCausalLM"
VALUE_MODEL = "Qwen3ForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    # Without head_dim transformers takes 128, and SGLang hidden_size / num_attention_heads.
    return read_decoder(fields, MODEL_TYPE, qk_norm="head", derives_head_dim=False)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
