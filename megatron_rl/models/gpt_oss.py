"""gpt-oss: attention with sinks, in some layers within a window, biases, and stacked experts with clamped SwiGLU."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, ClampedSwiglu
from megatron_rl.models.decoder_fields import read_decoder, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "gpt_oss"
CAUSAL_LM = "GptOssForCausalLM"
VALUE_MODEL = "GptOssForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {
    "experts_per_token": (),  # num_experts_per_tok by another name
    "initial_context_length": (),  # rope_scaling has it as original_max_position_embeddings
}
UNUSED = (r".*\.rotary_emb\.inv_freq",)
SERVER_FIELDS: tuple[str, ...] = ()

NAMES = blocks.Names(router="mlp.router", stacked="alternating")


def read(fields: JsonFields) -> Architecture:
    if not fields.boolean("attention_bias", True):
        raise fields.error("attention_bias", False, "true")
    window, windowed = _read_windows(fields)
    decoder = read_decoder(fields, MODEL_TYPE)
    alpha, limit = fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        expert_hidden_size=decoder.ffn_hidden_size,
        clamped=ClampedSwiglu(alpha, limit),
        biases=True,
        sinks=True,
        window=window,
        windowed_layers=windowed,
    )


def _read_windows(fields: JsonFields) -> tuple[int | None, tuple[int, ...]]:
    """Takes the window, and the numbers of the layers that have it: by default every other one, from the first on."""
    count = fields.left.get("num_hidden_layers")
    kinds = fields.left.pop("layer_types", None)
    if kinds is None:
        kinds = [("sliding_attention", "full_attention")[n % 2] for n in range(count if type(count) is int else 0)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or {*map(str, kinds)} - {"sliding_attention", "full_attention"}
    ):
        raise fields.error("layer_types", kinds, "sliding_attention or full_attention for each layer")
    windowed = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
    return (fields.integer("sliding_window") if windowed else None), windowed


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch, NAMES)


def server_caveats(arch: Architecture) -> tuple[str, ...]:
    return ()
