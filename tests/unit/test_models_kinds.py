"""Each weight has one kind, the same by its Hugging Face name and by the parameter that holds it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models_reference import (
    chunk_parameters,
    dense_architecture,
    hf_tensors,
    moe_architecture,
    stage_module,
    weight_names,
)
from torch import nn
from weight_kinds import kind_of

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks, Slot, bind, parameter_kinds
from megatron_rl.models.kinds import POLICY_KINDS, WEIGHT_KINDS
from megatron_rl.models.registry import kinds_of, weights_of
from megatron_rl.models.weight import REPLICATED, Source, Weight

MODELS = {
    "moe": moe_architecture(),
    "tied moe": moe_architecture(tied_embeddings=True),
    "dense": dense_architecture(),
    "critic": moe_architecture(value_head=True),
}


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
def test_weights_are_sorted_by_their_names(arch: Architecture) -> None:
    for weight in weights_of(arch):
        for source in weight.sources:
            assert weight.kind == kind_of(source.name), weight.name


def test_a_model_has_the_kinds_of_its_weights() -> None:
    assert kinds_of(MODELS["moe"]) == POLICY_KINDS == WEIGHT_KINDS[:-1]
    assert kinds_of(MODELS["critic"]) == WEIGHT_KINDS
    assert kinds_of(MODELS["dense"]) == ("attention", "embedding", "other")
    no_dense_layer = dataclasses.replace(MODELS["moe"], dense_layers=())
    assert kinds_of(no_dense_layer) == POLICY_KINDS


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_a_parameter_has_the_kind_of_the_weights_that_it_holds(transformer_engine: bool) -> None:
    """Transformer Engine keeps a norm and the linear layer after it in one module, but in two parameters."""
    arch = MODELS["moe"]
    layers = range(arch.num_layers)
    parameters = chunk_parameters(hf_tensors(arch), arch, layers, transformer_engine=transformer_engine)
    stage = stage_module(parameters, layers)
    kinds = parameter_kinds(bind([stage], arch, ModelRanks(), weight_names(transformer_engine)))
    found = {name: kinds[parameter] for name, parameter in stage.named_parameters()}
    assert {name for name, kind in found.items() if kind == "router"} == {
        f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 2, 3)
    }
    assert {kind for name, kind in found.items() if ".experts." in name} == {"expert"}
    assert {kind for name, kind in found.items() if "layer_norm_weight" in name or "layernorm" in name} == {
        "other",
        "attention",  # those of query and key heads
    }
    norms = [name for name in found if found[name] == "attention" and "norm" in name]
    assert len(norms) == 2 * arch.num_layers
    assert all("q_layernorm" in name or "k_layernorm" in name for name in norms)
    assert found["embedding.word_embeddings.weight"] == found["output_layer.weight"] == "embedding"


def test_a_parameter_of_two_kinds_is_an_error() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    first = Weight("first", (Source("a", (3,)),), REPLICATED, 0, "router")
    second = dataclasses.replace(first, name="second", kind="expert")
    with pytest.raises(ValueError, match=r"second \(expert\): its parameter holds another kind"):
        parameter_kinds([Slot(first, parameter, 0), Slot(second, parameter, 1)])
