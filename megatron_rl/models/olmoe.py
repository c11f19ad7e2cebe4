"""OLMoE: one norm over all query heads and one over all key heads, and experts in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, Router
from megatron_rl.models.decoder_fields import read_decoder, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "olmoe"
CAUSAL_LM = "OlmoeForCausalLM"
VALUE_MODEL = "OlmoeForTokenClassification"  # which transformers 5.19 lacks
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    fields.must_be("clip_qkv", None)
    decoder = read_decoder(fields, MODEL_TYPE, qk_norm="all")
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        expert_hidden_size=decoder.ffn_hidden_size,
        router=Router(pre_softmax=not fields.boolean("norm_topk_prob", False)),
    )


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> Iterator[str]:
    # SGLang 0.5.23 takes neither from config.json.
    if arch.num_kv_heads * arch.head_dim != arch.hidden_size:
        width = arch.num_kv_heads * arch.head_dim
        yield f"keys are {width} wide, but SGLang's {MODEL_TYPE} has a norm of hidden_size = {arch.hidden_size} on them"
    if arch.qk_norm == "all" and arch.rms_norm_eps != 1e-5:
        yield f"rms_norm_eps is {arch.rms_norm_eps}, but SGLang's {MODEL_TYPE} has 1e-05 in the norms on heads"
