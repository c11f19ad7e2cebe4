"""Llama 2 and 3, dense: grouped-query attention and a gated MLP."""

from __future__ import annotations

from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_decoder
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "llama"
CAUSAL_LM = "LlamaForCausalLM"
VALUE_MODEL = "LlamaForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    return read_decoder(fields, MODEL_TYPE)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
