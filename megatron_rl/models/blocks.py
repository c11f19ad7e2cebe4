"""The parts of decoders as lists of weights: a family puts them together in the order of its files. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.models.weight import COLUMNS, GATE_UP, REPLICATED, VOCABULARY, Source, Weight, grouped_qkv


def decoder(arch: Architecture) -> list[Weight]:
    """A whole model under the names that most families have: layers of attention and an MLP, dense or of experts."""
    found = list(embedding(arch))
    for layer in range(arch.num_layers):
        found += attention(arch, layer)
        found += experts(arch, layer) if arch.is_moe(layer) else dense_mlp(arch, layer)
    return [*found, *head(arch)]


def embedding(arch: Architecture) -> Iterator[Weight]:
    source = Source("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size))
    yield Weight("embedding.word_embeddings.weight", (source,), VOCABULARY, at="first", kind="embedding")


def attention(arch: Architecture, layer: int) -> Iterator[Weight]:
    """The attention of a layer, its norms on query and key heads if it has them, and the layer's two norms."""
    mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden = arch.hidden_size
    q_rows, kv_rows = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

    def norm(name: str, hf_name: str, width: int, kind: PolicyKind) -> Weight:
        return Weight(f"{mcore}.{name}.weight", (Source(f"{hf}.{hf_name}.weight", (width,)),), REPLICATED, layer, kind)

    yield norm("input_layernorm", "input_layernorm", hidden, "other")
    yield Weight(
        f"{mcore}.self_attention.linear_qkv.weight",
        (
            Source(f"{hf}.self_attn.q_proj.weight", (q_rows, hidden)),
            Source(f"{hf}.self_attn.k_proj.weight", (kv_rows, hidden)),
            Source(f"{hf}.self_attn.v_proj.weight", (kv_rows, hidden)),
        ),
        grouped_qkv(arch.num_kv_heads),
        layer,
        "attention",
    )
    if arch.qk_norm:
        yield norm("self_attention.q_layernorm", "self_attn.q_norm", arch.head_dim, "attention")
        yield norm("self_attention.k_layernorm", "self_attn.k_norm", arch.head_dim, "attention")
    yield Weight(
        f"{mcore}.self_attention.linear_proj.weight",
        (Source(f"{hf}.self_attn.o_proj.weight", (hidden, q_rows)),),
        COLUMNS,
        layer,
        "attention",
    )
    yield norm("pre_mlp_layernorm", "post_attention_layernorm", hidden, "other")


def dense_mlp(arch: Architecture, layer: int) -> Iterator[Weight]:
    mcore, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    ffn, hidden = arch.ffn_hidden_size, arch.hidden_size
    gate_up = tuple(Source(f"{hf}.{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
    yield Weight(f"{mcore}.linear_fc1.weight", gate_up, GATE_UP, layer, "other")
    down = Source(f"{hf}.down_proj.weight", (hidden, ffn))
    yield Weight(f"{mcore}.linear_fc2.weight", (down,), COLUMNS, layer, "other")


def experts(arch: Architecture, layer: int) -> Iterator[Weight]:
    """The router of a layer and all its experts, one after another."""
    mcore, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    ffn, hidden = arch.expert_hidden_size, arch.hidden_size
    gate = Source(f"{hf}.gate.weight", (arch.num_experts, hidden))
    yield Weight(f"{mcore}.router.weight", (gate,), REPLICATED, layer, "router")
    for expert in range(arch.num_experts):
        own = f"{hf}.experts.{expert}"
        gate_up = tuple(Source(f"{own}.{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
        yield Weight(f"{mcore}.experts.linear_fc1.weight{expert}", gate_up, GATE_UP, layer, "expert", expert)
        down = Source(f"{own}.down_proj.weight", (hidden, ffn))
        yield Weight(f"{mcore}.experts.linear_fc2.weight{expert}", (down,), COLUMNS, layer, "expert", expert)


def head(arch: Architecture) -> Iterator[Weight]:
    norm = Source("model.norm.weight", (arch.hidden_size,))
    yield Weight("decoder.final_layernorm.weight", (norm,), REPLICATED, at="last", kind="other")
    if arch.value_head:
        for name, shape in (("weight", (1, arch.hidden_size)), ("bias", (1,))):
            source = Source(f"score.{name}", shape)
            yield Weight(f"output_layer.{name}", (source,), REPLICATED, at="last", kind="value_head", optional=True)
        return
    # With tied embeddings a last stage that is not also the first keeps a copy of the embedding under this
    # name.
    name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    source = Source(name, (arch.vocab_size, arch.hidden_size))
    yield Weight("output_layer.weight", (source,), VOCABULARY, "last", "embedding", copy=arch.tied_embeddings)
