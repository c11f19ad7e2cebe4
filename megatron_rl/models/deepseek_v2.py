"""DeepSeek-V2-Lite: latent attention, and softmax routers with shared experts, after a dense layer.

V2 itself, with 236B parameters, ranks groups of experts by their best one, which Megatron-Core cannot do.
"""

from __future__ import annotations

import dataclasses

from megatron_rl.models import blocks, deepseek_v3
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.decoder_fields import read_routed_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "deepseek_v2"
CAUSAL_LM = "DeepseekV2ForCausalLM"
VALUE_MODEL = "DeepseekV2ForTokenClassification"
INERT = deepseek_v3.INERT
UNUSED = deepseek_v3.UNUSED
SERVER_FIELDS = ("moe_layer_freq", "topk_method")


def read(fields: JsonFields) -> Architecture:
    fields.must_be("scoring_func", "softmax")
    fields.must_be("topk_method", "greedy")
    fields.must_be("norm_topk_prob", False)
    fields.must_be("mlp_bias", False)
    decoder = deepseek_v3.read_latent_decoder(fields, MODEL_TYPE)
    for name in ("n_group", "topk_group"):  # greedy passes them over
        fields.left.pop(name, None)
    return dataclasses.replace(decoder, **read_routed_experts(fields, decoder.num_layers, "softmax"))


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
