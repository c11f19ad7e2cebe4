"""Fields of config.json that mean the same in most families. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from megatron_rl.models.architecture import Architecture, QkNorm, Router
from megatron_rl.models.fields import JsonFields
from megatron_rl.models.rotary_fields import read_rotary

MAX_LAYERS = 1_000  # lists as long as this are made of a model's layers; today's deepest has 126
MAX_EXPERTS = 4_096  # lists as long as this are made of a model's experts; today's widest has 512


def read_decoder(
    fields: JsonFields,
    model_type: str,
    *,
    qk_norm: QkNorm = "none",
    derives_head_dim: bool = True,
    partial_rotary: float | None = None,
) -> Architecture:
    """Takes what every pre-norm decoder with grouped-query attention, rotary positions and SwiGLU has: all but experts.

    `derives_head_dim`: whether a missing head_dim means hidden_size / num_attention_heads; `partial_rotary`: see
    read_rotary. Raises ModelError.
    """
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("attention_dropout", 0.0, 0)
    fields.must_be("use_sliding_window", False)
    fields.must_be("is_encoder_decoder", False)
    num_layers = fields.integer("num_hidden_layers", largest=MAX_LAYERS)
    layer_types = fields.left.pop("layer_types", None)
    if layer_types not in (None, ["full_attention"] * num_layers):
        raise fields.error("layer_types", layer_types, f'"full_attention" for each of the {num_layers} layers')
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    if fields.left.get("head_dim", 0) is None:
        del fields.left["head_dim"]
    derived = hidden_size // num_heads if derives_head_dim and hidden_size % num_heads == 0 else None
    decoder = Architecture(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", derived),
        vocab_size=fields.integer("vocab_size"),
        ffn_hidden_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        **read_rotary(fields, partial_rotary),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        qk_norm=qk_norm,
        tied_embeddings=fields.boolean("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range", 0.02),
    )
    if decoder.rotary_width < 2 or decoder.rotary_width % 2:
        raise fields.error("head_dim", decoder.head_dim, "one of which an even number of elements turns")
    return decoder


def read_experts(fields: JsonFields) -> dict[str, Any]:
    """Takes how many experts there are, and how many a token visits, as fields of Architecture. Raises ModelError."""
    # transformers 5 writes num_local_experts, earlier versions num_experts.
    names = [name for name in ("num_experts", "num_local_experts") if name in fields.left]
    counts = {fields.integer(name, largest=MAX_EXPERTS) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise fields.error("num_experts", sorted(counts), "the same number as num_local_experts")
    num_experts, per_token = counts.pop(), fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.error("num_experts_per_tok", per_token, f"at most num_experts = {num_experts}")
    return {"num_experts": num_experts, "experts_per_token": per_token}


def read_dense_layers(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Takes which layers have no experts: `mlp_only_layers`, and all but each `decoder_sparse_step`-th. Raises
    ModelError."""
    step = fields.integer("decoder_sparse_step", 1)
    mlp_only = fields.left.pop("mlp_only_layers", None) or []
    if not isinstance(mlp_only, list) or any(type(n) is not int or not 0 <= n < num_layers for n in mlp_only):
        raise fields.error("mlp_only_layers", mlp_only, f"a list of layer numbers from 0 to {num_layers - 1}")
    return tuple(n for n in range(num_layers) if n in mlp_only or (n + 1) % step)


def read_routed_experts(fields: JsonFields, num_layers: int, scores: Literal["softmax", "sigmoid"]) -> dict[str, Any]:
    """Takes the experts of DeepSeek's kind as fields of Architecture: routed ones, chosen within groups, and shared
    ones, after some dense layers. Sigmoids come with a bias. Raises ModelError."""
    fields.must_be("moe_layer_freq", 1)
    width, first = fields.integer("moe_intermediate_size"), fields.integer("first_k_dense_replace", 0, least=0)
    if "num_local_experts" not in fields.left:
        fields.left["num_experts"] = fields.take("n_routed_experts", None)
    experts = read_experts(fields)
    groups, best = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    per_token, num_experts = experts["experts_per_token"], experts["num_experts"]
    if num_experts % groups or best > groups:
        raise fields.error("n_group", groups, f"a divisor of {num_experts} experts, and at least topk_group = {best}")
    if groups == best:
        groups = best = 1  # every group is chosen
    elif per_token != 2 * best:
        # DeepSeek ranks groups by their 2 best experts, Megatron-Core by their num_experts_per_tok / topk_group best.
        raise fields.error("topk_group", best, f"half of num_experts_per_tok = {per_token}, or n_group")
    return {
        **experts,
        "expert_hidden_size": width,
        "dense_layers": tuple(range(min(first, num_layers))),
        "shared_hidden_size": width * fields.integer("n_shared_experts"),
        "router": Router(
            scores=scores,
            pre_softmax=scores == "softmax",
            bias=scores == "sigmoid",
            groups=groups,
            groups_per_token=best,
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
    }
