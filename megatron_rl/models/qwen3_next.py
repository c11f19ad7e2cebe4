"""Qwen3-Next: gated delta networks in most layers, gated attention in the others, and an expert that every token
visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_rl.models import blocks
from megatron_rl.models.architecture import Architecture, DeltaNet, Router
from megatron_rl.models.decoder_fields import read_decoder, read_dense_layers, read_experts
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.weight import Weight

MODEL_TYPE = "qwen3_next"
CAUSAL_LM = "Qwen3NextForCausalLM"
VALUE_MODEL = "Qwen3NextForTokenClassification"
INERT: dict[str, tuple[Any, ...]] = {}
UNUSED = (
    r".*\.rotary_emb\.inv_freq",
    r"mtp\..*",  # predicts several tokens at once
)
SERVER_FIELDS = ("full_attention_interval",)

NAMES = blocks.Names(shared="mlp.shared_expert")
INTERVAL = 4
"""Layers from one with attention to the next, if config.json does not say."""
MAX_KERNEL = 64  # tokens; today's models have 4
_KINDS = ["linear_attention", "full_attention"]


def read(fields: JsonFields) -> Architecture:
    return read_hybrid(fields, MODEL_TYPE)


def read_hybrid(fields: JsonFields, model_type: str) -> Architecture:
    """Takes the fields of a decoder with delta networks beside attention. Raises ModelError."""
    kinds = fields.left.pop("layer_types", None)  # which read_decoder expects to be of one kind
    decoder = read_decoder(fields, model_type, qk_norm="head", derives_head_dim=False, partial_rotary=0.25)
    return dataclasses.replace(
        decoder,
        **read_experts(fields),
        expert_hidden_size=fields.integer("moe_intermediate_size"),
        dense_layers=read_dense_layers(fields, decoder.num_layers),
        router=Router(pre_softmax=not fields.boolean("norm_topk_prob", True)),
        shared_hidden_size=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
        output_gate=True,
        zero_centred_norms=True,
        delta_net=_read_delta_net(fields, kinds, decoder.num_layers),
    )


def _read_delta_net(fields: JsonFields, kinds: Any, num_layers: int) -> DeltaNet:
    key_heads, value_heads = fields.integer("linear_num_key_heads"), fields.integer("linear_num_value_heads")
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", value_heads, f"a multiple of linear_num_key_heads = {key_heads}")
    return DeltaNet(
        layers=_read_layers(fields, kinds, num_layers),
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        kernel=fields.integer("linear_conv_kernel_dim", largest=MAX_KERNEL),
    )


def _read_layers(fields: JsonFields, kinds: Any, num_layers: int) -> tuple[int, ...]:
    """Returns the layers with a delta network. `kinds` are the layer_types of config.json, or None."""
    is_given = "full_attention_interval" in fields.left
    by_interval = _all_but_each(fields.integer("full_attention_interval", INTERVAL), num_layers)
    if kinds is None:
        return by_interval
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
        raise fields.error("layer_types", kinds, f"{' or '.join(_KINDS)} for each of the {num_layers} layers")
    listed = tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    if is_given and listed != by_interval:
        raise fields.error("layer_types", kinds, "what full_attention_interval says")
    return listed


def _all_but_each(interval: int, num_layers: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(num_layers) if (layer + 1) % interval)


def weights(arch: Architecture) -> list[Weight]:
    return blocks.decoder(arch, NAMES)


def server_caveats(arch: Architecture) -> Iterator[str]:
    if arch.dense_layers:
        # SGLang 0.5.23 passes mlp_only_layers over.
        yield f"layers {list(arch.dense_layers)} are dense, but SGLang's {MODEL_TYPE} has experts in every layer"
