"""MiniMax-M2: norms over all heads together, heads that turn by half, sigmoid routers with a bias."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, Router
from megatron_rl.models.decoder_fields import read_decoder, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "minimax_m2"
CAUSAL_LM = "MiniMaxM2ForCausalLM"
VALUE_MODEL = "MiniMaxM2ForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {
    "mlp_intermediate_size": (),  # of dense layers, which it has not
    "mtp_transformer_layers": (),
    "router_jitter_noise": (0.0, 0),
    "shared_intermediate_size": (0,),
    "shared_moe_mode": (),
    "use_mtp": (),
}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS = ("rotary_dim", "scoring_func", "use_qk_norm", "use_routing_bias")
NAMES = blocks.Names(
    gate_up_down=("w1", "w3", "w2"),
    router="block_sparse_moe.gate",
    router_bias="block_sparse_moe.e_score_correction_bias",
    experts="block_sparse_moe.experts",
)


def read(fields: JsonFields) -> Architecture:
    fields.must_be("scoring_func", "sigmoid")
    fields.must_be("use_routing_bias", True)
    fields.must_be("use_qk_norm", True)
    fields.must_be("qk_norm_type", "per_layer")
    layers = fields.left.get("num_hidden_layers", 0)
    fields.must_be("attn_type_list", [1] * layers if type(layers) is int else [], None)
    if "rotary_dim" in fields.left:  # in place of partial_rotary_factor
        fields.left["partial_rotary_factor"] = fields.integer("rotary_dim") / fields.left.get("head_dim", 1)
    decoder = read_decoder(fields, MODEL_TYPE, qk_norm="all", partial_rotary=1.0)
    predictors = fields.integer("num_mtp_modules", 0, least=0)
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        expert_hidden_size=decoder.ffn_hidden_size,
        router=Router(scores="sigmoid", bias=True),
        predictor_layers=predictors,
    )


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch, NAMES)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
