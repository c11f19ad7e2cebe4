"""The parts of decoders as lists of weights: a family puts them together in the order of its files. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.models.weight import (
    COLUMNS,
    GATE_UP,
    REPLICATED,
    ROWS,
    VOCABULARY,
    Part,
    Shape,
    Sharding,
    Source,
    Weight,
    grouped_qkv,
)


@dataclass(frozen=True)
class Names:
    """What a family's files call the parts of a layer, below `model.layers.N`, and how they join them."""

    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    stacked: Literal["no", "alternating", "in_halves"] = "no"  # whether one tensor has all experts of a layer, and how
    delta_inputs: Literal["grouped", "split"] = "grouped"  # projections of a delta network: by key head, or by kind


def decoder(arch: Architecture, names: Names = Names()) -> list[Weight]:
    """A whole model: layers of attention and an MLP, dense or of experts."""
    found = list(embedding(arch))
    for layer in range(arch.num_layers):
        found.append(_layer_norm(arch, layer, "input_layernorm", "input_layernorm"))
        found += _mixer(arch, layer, names)
        found.append(_layer_norm(arch, layer, "pre_mlp_layernorm", "post_attention_layernorm"))
        if arch.is_moe(layer):
            found += experts(arch, layer, names)
        else:
            found += mlp(arch.hidden_size, arch.ffn_hidden_size, layer, "mlp", "mlp", names, "other")
    # Last, because they alone are fp32 in every model: the tensors that are exported together have one dtype.
    biases = [router_bias(arch, layer, names) for layer in arch.moe_layers] if arch.router.bias else []
    return [*found, *head(arch), *biases]


def below(prefix: str, weights: list[Weight]) -> list[Weight]:
    """Returns the weights of a decoder that is a part of a larger model, in whose files `model.` is `model.prefix.`."""

    def within(name: str) -> str:
        return name.replace("model.", f"model.{prefix}.", 1)

    def renamed(source: Source) -> Source:
        return dataclasses.replace(source, name=within(source.name), alone=source.alone and within(source.alone))

    return [dataclasses.replace(weight, sources=tuple(map(renamed, weight.sources))) for weight in weights]


def _mixer(arch: Architecture, layer: int, names: Names) -> Iterator[Weight]:
    """What mixes a layer's tokens."""
    if arch.has_delta_net(layer):
        return delta_net(arch, layer, names)
    return latent_attention(arch, layer) if arch.latent else attention(arch, layer)


def _layer_norm(arch: Architecture, layer: int, name: str, hf_name: str) -> Weight:
    source = Source(f"model.layers.{layer}.{hf_name}.weight", (arch.hidden_size,))
    return Weight(f"decoder.layers.{layer}.{name}.weight", (source,), REPLICATED, layer, "other")


def embedding(arch: Architecture) -> Iterator[Weight]:
    source = Source("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size))
    yield Weight("embedding.word_embeddings.weight", (source,), VOCABULARY, at="first", kind="embedding")


def attention(arch: Architecture, layer: int) -> Iterator[Weight]:
    """The attention of a layer, and its norms on query and key heads if it has them."""
    mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden = arch.hidden_size
    q_rows, kv_rows = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

    # With an output gate a head's query is followed by its gate.
    with_gate = 2 * q_rows if arch.output_gate else q_rows
    has_bias = arch.qkv_bias or arch.biases
    columns = {"weight": (hidden,), "bias": ()} if has_bias else {"weight": (hidden,)}
    for part, width in columns.items():
        sources = tuple(
            Source(f"{hf}.self_attn.{name}_proj.{part}", (rows, *width))
            for name, rows in (("q", with_gate), ("k", kv_rows), ("v", kv_rows))
        )
        shared = grouped_qkv(arch.num_kv_heads)
        yield Weight(f"{mcore}.self_attention.linear_qkv.{part}", sources, shared, layer, "attention")
    for name, rows in (("q", q_rows), ("k", kv_rows)):
        if arch.qk_norm != "none":
            length = arch.head_dim if arch.qk_norm == "head" else rows
            norm = Source(f"{hf}.self_attn.{name}_norm.weight", (length,))
            yield Weight(f"{mcore}.self_attention.{name}_layernorm.weight", (norm,), REPLICATED, layer, "attention")
    yield Weight(
        f"{mcore}.self_attention.linear_proj.weight",
        (Source(f"{hf}.self_attn.o_proj.weight", (hidden, q_rows)),),
        COLUMNS,
        layer,
        "attention",
    )
    if arch.biases:
        bias = Source(f"{hf}.self_attn.o_proj.bias", (hidden,))
        yield Weight(f"{mcore}.self_attention.linear_proj.bias", (bias,), REPLICATED, layer, "attention")
    if arch.sinks:
        sinks = Source(f"{hf}.self_attn.sinks", (arch.num_heads,))
        yield Weight(f"{mcore}.self_attention.core_attention.softmax_offset", (sinks,), ROWS, layer, "attention")


def latent_attention(arch: Architecture, layer: int) -> Iterator[Weight]:
    """The latent attention of a layer."""
    mcore, hf = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    latent, hidden = arch.latent, arch.hidden_size
    assert latent is not None

    def own(name: str, hf_name: str, shape: Shape, sharding: Sharding) -> Weight:
        source = Source(f"{hf}.{hf_name}.weight", shape)
        return Weight(f"{mcore}.{name}.weight", (source,), sharding, layer, "attention")

    rows, rank = arch.num_heads * arch.head_dim, latent.query_rank
    if rank is None:
        yield own("linear_q_proj", "q_proj", (rows, hidden), ROWS)
    else:
        yield own("linear_q_down_proj", "q_a_proj", (rank, hidden), REPLICATED)
        yield own("q_layernorm", "q_a_layernorm", (rank,), REPLICATED)
        yield own("linear_q_up_proj", "q_b_proj", (rows, rank), ROWS)
    down, up = latent.kv_rank + latent.rope_dim, arch.num_heads * (latent.nope_dim + latent.value_dim)
    yield own("linear_kv_down_proj", "kv_a_proj_with_mqa", (down, hidden), REPLICATED)
    yield own("kv_layernorm", "kv_a_layernorm", (latent.kv_rank,), REPLICATED)
    yield own("linear_kv_up_proj", "kv_b_proj", (up, latent.kv_rank), ROWS)
    yield own("linear_proj", "o_proj", (hidden, arch.num_heads * latent.value_dim), COLUMNS)


def delta_net(arch: Architecture, layer: int, names: Names) -> Iterator[Weight]:
    """The gated delta network of a layer."""
    mcore, hf = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.linear_attn"
    net, hidden = arch.delta_net, arch.hidden_size
    assert net is not None
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim

    def own(name: str, sources: Mapping[str, Shape], sharding: Sharding) -> Weight:
        found = tuple(Source(f"{hf}.{source}", shape) for source, shape in sources.items())
        return Weight(f"{mcore}.{name}", found, sharding, layer, "attention")

    inputs: list[Source] = []
    rest: tuple[tuple[str, int], ...] = (("qkvz", 2 * keys + 2 * values), ("ba", 2 * net.value_heads))
    if names.delta_inputs == "split":
        joined = (2 * keys + values, hidden)
        for rows, at in ((keys, 0), (keys, keys), (values, 2 * keys)):
            inputs.append(Source(f"{hf}.in_proj_qkv.weight", (rows, hidden), Part(joined, offset=at)))
        rest = (("z", values), ("b", net.value_heads), ("a", net.value_heads))
    inputs += [Source(f"{hf}.in_proj_{name}.weight", (rows, hidden)) for name, rows in rest]
    groups = Sharding(blocks=net.key_heads)
    yield Weight(f"{mcore}.in_proj.weight", tuple(inputs), groups, layer, "attention")
    sections = Sharding(sections=(keys, keys, values))
    yield own("conv_weight", {"conv1d.weight": (2 * keys + values, 1, net.kernel)}, sections)
    yield own("dt_bias", {"dt_bias": (net.value_heads,)}, ROWS)
    yield own("A_log", {"A_log": (net.value_heads,)}, ROWS)
    yield own("norm.weight", {"norm.weight": (net.value_dim,)}, REPLICATED)
    yield own("out_proj.weight", {"out_proj.weight": (hidden, values)}, COLUMNS)


def mlp(
    hidden: int,
    width: int,
    layer: int,
    mcore: str,
    hf: str,
    names: Names,
    kind: PolicyKind,
    expert: int | None = None,
) -> Iterator[Weight]:
    """A gated MLP under its names within a layer; of one expert if `expert` is given."""
    gate, up, down = (f"model.layers.{layer}.{hf}.{name}.weight" for name in names.gate_up_down)
    number = "" if expert is None else str(expert)
    gate_up = (Source(gate, (width, hidden)), Source(up, (width, hidden)))
    mcore = f"decoder.layers.{layer}.{mcore}"
    yield Weight(f"{mcore}.linear_fc1.weight{number}", gate_up, GATE_UP, layer, kind, expert)
    yield Weight(f"{mcore}.linear_fc2.weight{number}", (Source(down, (hidden, width)),), COLUMNS, layer, kind, expert)


def experts(arch: Architecture, layer: int, names: Names) -> Iterator[Weight]:
    """The router of a layer, all its experts, one after another, and the expert that every token visits."""
    hidden = arch.hidden_size
    mcore, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}"
    gate = Source(f"{hf}.{names.router}.weight", (arch.num_experts, hidden))
    yield Weight(f"{mcore}.router.weight", (gate,), REPLICATED, layer, "router")
    if arch.biases:
        bias = Source(f"{hf}.{names.router}.bias", (arch.num_experts,))
        yield Weight(f"{mcore}.router.bias", (bias,), REPLICATED, layer, "router")
    match names.stacked:
        case "alternating":
            yield from _alternating_experts(arch, layer, f"{hf}.{names.experts}")
        case "in_halves":
            yield from _experts_in_halves(arch, layer, f"{hf}.{names.experts}", names)
        case "no":
            for expert in range(arch.num_experts):
                own = f"{names.experts}.{expert}"
                yield from mlp(hidden, arch.expert_hidden_size, layer, "mlp.experts", own, names, "expert", expert)
    if arch.shared_hidden_size:
        yield from mlp(hidden, arch.shared_hidden_size, layer, "mlp.shared_experts", names.shared, names, "expert")
    if arch.shared_gate:
        source = Source(f"{hf}.{names.shared_gate}.weight", (1, hidden))
        yield Weight(f"{mcore}.shared_experts.gate_weight", (source,), REPLICATED, layer, "expert")


def _alternating_experts(arch: Architecture, layer: int, name: str) -> Iterator[Weight]:
    """The experts of a layer, each with biases, as four tensors hold them [gpt-oss].

    gate_up_proj [E, H, 2F] and its bias [E, 2F] have gate at even and up at odd positions; down_proj [E, F, H] and its
    bias [E, H]. Each rank of expert-tensor parallelism adds the second bias to some outputs.
    """
    count, hidden, width = arch.num_experts, arch.hidden_size, arch.expert_hidden_size
    mcore = f"decoder.layers.{layer}.mlp.experts"
    for expert in range(count):
        pair = (Part((count, hidden, 2 * width), expert, True, offset, step=2) for offset in (0, 1))
        sources = tuple(Source(f"{name}.gate_up_proj", (width, hidden), part) for part in pair)
        yield Weight(f"{mcore}.linear_fc1.weight{expert}", sources, GATE_UP, layer, "expert", expert)
    for expert in range(count):
        pair = (Part((count, 2 * width), expert, False, offset, step=2) for offset in (0, 1))
        sources = tuple(Source(f"{name}.gate_up_proj_bias", (width,), part) for part in pair)
        yield Weight(f"{mcore}.linear_fc1.bias{expert}", sources, GATE_UP, layer, "expert", expert)
    for expert in range(count):
        down = Source(f"{name}.down_proj", (hidden, width), Part((count, width, hidden), expert, True))
        yield Weight(f"{mcore}.linear_fc2.weight{expert}", (down,), COLUMNS, layer, "expert", expert)
    for expert in range(count):
        bias = Source(f"{name}.down_proj_bias", (hidden,), Part((count, hidden), expert))
        yield Weight(f"{mcore}.linear_fc2.bias{expert}", (bias,), ROWS, layer, "expert", expert)


def _experts_in_halves(arch: Architecture, layer: int, name: str, names: Names) -> Iterator[Weight]:
    """The experts of a layer as two tensors hold them [Qwen3.5]: gate_up_proj [E, 2F, H], whose first half is gate, and
    down_proj [E, H, F]; or as those of `names` do, one by one."""
    count, hidden, width = arch.num_experts, arch.hidden_size, arch.expert_hidden_size
    mcore = f"decoder.layers.{layer}.mlp.experts"
    *halves, down = names.gate_up_down
    for expert in range(count):
        sources = tuple(
            Source(
                f"{name}.gate_up_proj",
                (width, hidden),
                Part((count, 2 * width, hidden), expert, offset=half * width),
                alone=f"{name}.{expert}.{own}.weight",
            )
            for half, own in enumerate(halves)
        )
        yield Weight(f"{mcore}.linear_fc1.weight{expert}", sources, GATE_UP, layer, "expert", expert)
    for expert in range(count):
        part = Part((count, hidden, width), expert)
        source = Source(f"{name}.down_proj", (hidden, width), part, alone=f"{name}.{expert}.{down}.weight")
        yield Weight(f"{mcore}.linear_fc2.weight{expert}", (source,), COLUMNS, layer, "expert", expert)


def router_bias(arch: Architecture, layer: int, names: Names) -> Weight:
    """What a layer's router adds to its scores to choose experts, and not to weigh them."""
    source = Source(f"model.layers.{layer}.{names.router_bias}", (arch.num_experts,))
    name = f"decoder.layers.{layer}.mlp.router.expert_bias"
    return Weight(name, (source,), REPLICATED, layer, "router", trained=False)


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
