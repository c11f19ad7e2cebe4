"""Weights divided into shards and put together again, without files or processes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_reference import (
    chunk_layers,
    chunk_parameters,
    dense_architecture,
    hf_shapes,
    hf_tensors,
    moe_architecture,
    stage_module,
    weight_names,
)
from torch import Tensor, nn

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.engine.export import holders, model_ranks
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks, bind
from megatron_rl.models.registry import family_of, weights_of
from megatron_rl.models.shards import assemble, fill
from megatron_rl.models.weight import COLUMNS, GATE_UP, VOCABULARY, Piece, Weight, grouped_qkv


def fill_rank(
    hf: dict[str, Tensor], arch: Architecture, layout: Layout, rank: int, transformer_engine: bool
) -> tuple[list[nn.Module], list[dict[str, Tensor]]]:
    """Returns the rank's stages as filled by the package, and their expected parameters from the reference."""
    ranks = model_ranks(layout, rank)
    chunks, expected = [], []
    for layers in chunk_layers(arch, layout.coordinates(rank).pp, layout.pp, layout.vpp):
        parameters = chunk_parameters(
            hf,
            arch,
            layers,
            tp=(ranks.tp_rank, ranks.tp_size),
            ep=(ranks.ep_rank, ranks.ep_size),
            etp=(ranks.etp_rank, ranks.etp_size),
            transformer_engine=transformer_engine,
        )
        expected.append(parameters)
        chunks.append(stage_module({n: torch.full_like(t, math.nan) for n, t in parameters.items()}, layers))
    for slot in bind(chunks, arch, ranks, weight_names(transformer_engine)):
        fill(
            slot.weight,
            slot.of(slot.parameter.data),
            lambda source, dim, start, length: hf[source.name].narrow(dim, start, length),
            *ranks.share(slot.weight),
        )
    return chunks, expected


def differs(chunks: list[nn.Module], expected: list[dict[str, Tensor]]) -> list[str]:
    return [
        name
        for chunk, parameters in zip(chunks, expected, strict=True)
        for name, parameter in chunk.named_parameters()
        if not torch.equal(parameter.data, parameters[name])
    ]


@st.composite
def models_and_layouts(draw: st.DrawFn) -> tuple[Architecture, Layout]:
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    tp, pp, vpp = choose(1, 2, 4), choose(1, 2, 3), choose(1, 2)
    vpp = vpp if pp > 1 else 1
    kv_heads = choose(1, 2, 4)
    num_layers = pp * vpp * choose(1, 2)
    changes: dict = {
        "num_layers": num_layers,
        "hidden_size": choose(4, 6),
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * choose(1, 2, 3),
        "head_dim": choose(4, 8),
        "vocab_size": draw(st.integers(3, 17)),
        "ffn_hidden_size": 4 * choose(1, 2),
        "tied_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        ep, etp = choose(1, 2, 4), choose(1, 2)
        dense = tuple(n for n in range(num_layers) if draw(st.booleans()))
        arch = moe_architecture(**changes, num_experts=ep * choose(1, 2), dense_layers=dense)
    else:
        ep, etp = 1, 1
        arch = dense_architecture(**changes)
    world = math.lcm(tp, ep * etp) * choose(1, 2) * pp
    return arch, Layout.resolve(ParallelConfig(tp=tp, etp=etp, ep=ep, pp=pp, vpp=vpp), world)


@given(models_and_layouts(), st.booleans())
def test_every_layout_loads_the_reference_and_exports_the_checkpoint(case, transformer_engine):
    arch, layout = case
    hf = hf_tensors(arch)
    ranks = []
    for rank in range(layout.world_size):
        chunks, expected = fill_rank(hf, arch, layout, rank, transformer_engine)
        assert differs(chunks, expected) == []
        slots = bind(chunks, arch, model_ranks(layout, rank), weight_names(transformer_engine))
        ranks.append({slot.weight.name: slot for slot in slots})

    held: list[tuple[Weight, list[Tensor]]] = []
    for weight in weights_of(arch):
        if not weight.copy:
            slots = [ranks[holder][weight.name] for holder in holders(layout, weight, arch)]
            held.append((weight, [slot.of(slot.parameter.data) for slot in slots]))
    exported = assemble(held)
    assert [name for name, _ in exported] == list(hf)
    assert all(torch.equal(tensor, hf[name]) for name, tensor in exported)


@pytest.mark.parametrize("mutation", ["q and k", "gate and up", "two experts", "two layers' routers"])
def test_swapped_weights_are_detected(monkeypatch, mutation):
    arch = moe_architecture(num_heads=2)  # q and k have the same shape
    family = family_of(arch)
    original = family.weights

    def mutated(arch: Architecture) -> list:
        weights = original(arch)
        names = {weight.name: i for i, weight in enumerate(weights)}
        layer = "decoder.layers.2"
        first, second = {
            "q and k": (f"{layer}.self_attention.linear_qkv.weight",) * 2,
            "gate and up": (f"{layer}.mlp.experts.linear_fc1.weight1",) * 2,
            "two experts": tuple(f"{layer}.mlp.experts.linear_fc2.weight{e}" for e in (1, 2)),
            "two layers' routers": (
                "decoder.layers.2.mlp.router.weight",
                "decoder.layers.3.mlp.router.weight",
            ),
        }[mutation]
        a, b = weights[names[first]], weights[names[second]]
        if a is b:
            one, two, *rest = a.sources
            weights[names[first]] = dataclasses.replace(a, sources=(two, one, *rest))
        else:
            weights[names[first]] = dataclasses.replace(a, sources=b.sources)
            weights[names[second]] = dataclasses.replace(b, sources=a.sources)
        return weights

    layout = Layout.resolve(ParallelConfig(), 1)
    assert differs(*fill_rank(hf_tensors(arch), arch, layout, 0, False)) == []
    monkeypatch.setattr(family, "weights", mutated)
    assert differs(*fill_rank(hf_tensors(arch), arch, layout, 0, False)) != []


def test_shard_pieces_by_hand():
    # Two key-value heads of width 2, two query heads each, over two ranks.
    assert grouped_qkv(2).cut([8, 4, 4], rank=1, size=2) == (
        8,
        (Piece(0, 4, 4, 0), Piece(1, 2, 2, 4), Piece(2, 2, 2, 6)),
    )
    # With more ranks than key-value heads, a rank's shard begins inside a group.
    assert grouped_qkv(1).cut([4, 2, 2], rank=1, size=2) == (4, (Piece(1, 0, 2, 0), Piece(2, 0, 2, 2)))
    assert GATE_UP.cut([6, 6], rank=2, size=3) == (4, (Piece(0, 4, 2, 0), Piece(1, 4, 2, 2)))
    assert COLUMNS.cut([6], rank=1, size=2) == (3, (Piece(0, 3, 3, 0),))
    assert VOCABULARY.cut([5], rank=1, size=2) == (3, (Piece(0, 3, 2, 0),))
    assert VOCABULARY.cut([5], rank=3, size=4) == (2, ())


@pytest.mark.parametrize("arch", [moe_architecture(), dense_architecture(tied_embeddings=True)])
def test_the_family_lists_the_checkpoint_in_order(arch):
    listed = [
        (source.name, source.shape) for weight in weights_of(arch) if not weight.copy for source in weight.sources
    ]
    assert listed == list(hf_shapes(arch).items())


@pytest.mark.parametrize(
    ("name", "size"),
    [("mlp.linear_fc1", 4), ("self_attention.linear_proj", 3), ("self_attention.linear_qkv", 3)],
)
def test_the_error_names_a_weight_that_does_not_divide(name, size):
    arch = dense_architecture(ffn_hidden_size=10)
    weights = {weight.name: weight for weight in weights_of(arch)}
    with pytest.raises(ValueError, match=rf"layers\.0\.{name}\.weight: .* {size} shards; choose"):
        weights[f"decoder.layers.0.{name}.weight"].cut(0, size)


def test_the_error_names_experts_that_do_not_divide():
    with pytest.raises(ValueError, match="4 experts do not divide over 3"):
        bind([], moe_architecture(), ModelRanks(ep_size=3), weight_names())


def bad_stages(change) -> list[nn.Module]:
    arch = moe_architecture()
    parameters = chunk_parameters(hf_tensors(arch), arch, range(4))
    change(parameters)
    return [stage_module(parameters, range(4))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update({"decoder.layers.0.mlp.bias": torch.zeros(2)}),
            r"layers\.0\.mlp\.bias .* no weight",
        ),
        (
            lambda p: p.pop("decoder.layers.2.self_attention.k_layernorm.weight"),
            r"no parameter .* holds decoder\.layers\.2\.self_attention\.k_layernorm\.weight .*k_norm",
        ),
        (lambda p: p.pop("output_layer.weight"), r"no parameter .* output_layer\.weight \(lm_head\.weight\)"),
        (
            lambda p: p.update({"decoder.layers.0.mlp.experts.weight2": torch.zeros(3, 12, 4)}),
            r"layers\.0\.mlp\.experts\.weight2 has shape \(3, 12, 4\); .* ask for \(4, 12, 4\)",
        ),
        (
            lambda p: p.update({"decoder.layers.0.mlp.experts.linear_fc1.weight4": torch.zeros(8, 12)}),
            r"linear_fc1\.weight4 .* is no weight",
        ),
        (
            lambda p: p.update({"decoder.layers.0.mlp.experts.linear_fc1.weight1": torch.zeros(8, 12)}),
            r"layers\.0\.mlp\.experts\.linear_fc1\.weight1 is held twice",
        ),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bind(bad_stages(change), moe_architecture(), ModelRanks(), weight_names())


def test_an_expert_of_another_rank_is_refused():
    arch = moe_architecture()
    parameters = chunk_parameters(hf_tensors(arch), arch, range(4), ep=(0, 2), transformer_engine=True)
    parameters["decoder.layers.0.mlp.experts.linear_fc1.weight2"] = torch.zeros(8, 12)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight2 .* is no weight of this rank"):
        bind([stage_module(parameters, range(4))], arch, ModelRanks(ep_size=2), weight_names(True))


def test_layers_are_numbered_by_their_global_layer_number():
    arch = moe_architecture(dense_layers=())
    stage = stage_module(chunk_parameters(hf_tensors(arch), arch, [2, 3]), [2, 3])
    names = [slot.weight.name for slot in bind([stage], arch, ModelRanks(), weight_names())]
    assert names[0] == "decoder.layers.2.input_layernorm.weight"
    assert names[-1] == "output_layer.weight"
