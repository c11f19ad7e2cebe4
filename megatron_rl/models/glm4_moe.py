"""GLM-4.5, 4.6 and 4.7: heads that turn by half, with biases, and DeepSeek's routers and experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_decoder, read_routed_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "glm4_moe"
CAUSAL_LM = "Glm4MoeForCausalLM"
VALUE_MODEL = "Glm4MoeForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()


def read(fields: JsonFields) -> Architecture:
    fields.must_be("norm_topk_prob", True)
    has_norm, has_bias = fields.boolean("use_qk_norm", False), fields.boolean("attention_bias", False)
    decoder = read_decoder(fields, MODEL_TYPE, qk_norm="head" if has_norm else "none", partial_rotary=0.5)
    experts = read_routed_experts(fields, decoder.num_layers, "sigmoid")
    predictors = fields.integer("num_nextn_predict_layers", 0, least=0)
    return dataclasses.replace(decoder, **experts, qkv_bias=has_bias, predictor_layers=predictors)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
