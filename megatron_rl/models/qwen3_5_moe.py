"""Qwen3.5-MoE and Qwen3.6-MoE: Qwen3-Next's language model with other files, beside a vision tower, which does not
train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from megatron_rl.models import blocks, qwen3_next
from megatron_rl.models.architecture import INERT as INERT_EVERYWHERE
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen3_5_moe"
CAUSAL_LM = "Qwen3_5MoeForConditionalGeneration"
VALUE_MODEL = "Qwen3_5MoeForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),  # of the delta networks' state
    "mtp_num_hidden_layers": (),
    "mtp_use_dedicated_embeddings": (),
}
UNUSED = (
    r"mtp\..*",  # predicts several tokens at once
    r"model\.visual\..*",
)
SERVER_FIELDS = ("full_attention_interval",)

NAMES = dataclasses.replace(qwen3_next.NAMES, stacked="in_halves", delta_inputs="split")
_OF_IMAGES = (
    "image_token_id",
    "language_model_only",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
)


def read(fields: JsonFields) -> Architecture:
    fields.must_be("tie_word_embeddings", False)
    fields.enter("text_config", {**INERT_EVERYWHERE, **dict.fromkeys(_OF_IMAGES, ())})
    fields.must_be("model_type", "qwen3_5_moe_text")
    fields.must_be("tie_word_embeddings", False)
    fields.must_be("mlp_only_layers", [], None)
    fields.must_be("decoder_sparse_step", 1)
    # transformers always normalises, and SGLang asks this field.
    fields.must_be("norm_topk_prob", True)
    # Every layer has experts, and config.json no width of one without.
    width = fields.integer("moe_intermediate_size")
    fields.left |= {"tie_word_embeddings": False, "moe_intermediate_size": width}
    fields.left.setdefault("intermediate_size", width)
    return qwen3_next.read_hybrid(fields, MODEL_TYPE)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.below("language_model", blocks.decoder(arch, NAMES))


def server_caveats(arch: Architecture) -> Iterable[str]:
    return qwen3_next.server_caveats(arch)
