"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, sigmoid routers with a bias, experts after dense layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, LatentAttention
from megatron_rl.models.decoder_fields import read_decoder, read_routed_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "deepseek_v3"
CAUSAL_LM = "DeepseekV3ForCausalLM"
VALUE_MODEL = "DeepseekV3ForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("aux_loss_alpha", "ep_size", "seq_aux"), ()),
    "moe_router_bias_update_speed": (),
    "qk_head_dim": (),  # the sum of two fields that are read
}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS = ("moe_layer_freq", "scoring_func", "topk_method")


def read(fields: JsonFields) -> Architecture:
    fields.must_be("scoring_func", "sigmoid")
    fields.must_be("topk_method", "noaux_tc")
    fields.must_be("norm_topk_prob", True)
    decoder = read_latent_decoder(fields, MODEL_TYPE)
    experts = read_routed_experts(fields, decoder.num_layers, "sigmoid")
    predictors = fields.integer("num_nextn_predict_layers", 0, least=0)
    return dataclasses.replace(decoder, **experts, predictor_layers=predictors)


def read_latent_decoder(fields: JsonFields, model_type: str) -> Architecture:
    """Takes what a decoder with latent attention has: all but experts. Raises ModelError."""
    fields.must_be("rope_interleave", True)
    latent = LatentAttention(
        query_rank=None if fields.left.get("q_lora_rank", 0) is None else fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )
    fields.left.pop("q_lora_rank", None)
    heads = fields.left.get("num_attention_heads")
    fields.must_be("num_key_value_heads", heads, None)
    # transformers writes the part that turns as head_dim.
    fields.left |= {"head_dim": latent.nope_dim + latent.rope_dim, "num_key_value_heads": heads}
    decoder = read_decoder(fields, model_type)
    return dataclasses.replace(decoder, latent=latent)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
