"""GLM-4.7-Flash: DeepSeek-V3's attention, routers and experts under other names of fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks, deepseek_v3
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_routed_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "glm4_moe_lite"
CAUSAL_LM = "Glm4MoeLiteForCausalLM"
VALUE_MODEL = "Glm4MoeLiteForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {"qk_head_dim": ()}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS = ("first_k_dense_replace",)


def read(fields: JsonFields) -> Architecture:
    fields.must_be("topk_method", "noaux_tc")
    fields.must_be("norm_topk_prob", True)
    decoder = deepseek_v3.read_latent_decoder(fields, MODEL_TYPE)
    kinds = fields.left.pop("mlp_layer_types", None)
    if kinds is not None:  # transformers 5 writes them in place of first_k_dense_replace
        dense = kinds.count("dense") if isinstance(kinds, list) else 0
        if kinds != ["dense"] * dense + ["sparse"] * (decoder.num_layers - dense):
            raise fields.error("mlp_layer_types", kinds, f'"dense", then "sparse", for {decoder.num_layers} layers')
        fields.must_be("first_k_dense_replace", dense)
        fields.left["first_k_dense_replace"] = dense
    experts = read_routed_experts(fields, decoder.num_layers, "sigmoid")
    predictors = fields.integer("num_nextn_predict_layers", 0, least=0)
    return dataclasses.replace(decoder, **experts, predictor_layers=predictors)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
