"""Which exported tensors are changed under stress, and what is reported of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models_reference import dense_architecture, hf_shapes, moe_architecture
from stress_reference import QUANTISED
from torch import Tensor

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.config.stress import held_targets
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.registry import weights_of
from megatron_rl.weights.stressed import StressedBuckets, WeightStress, read_stress, target_of

ARCHITECTURES = {
    "experts and a dense layer": moe_architecture(dense_layers=(1,)),
    "experts only, tied": moe_architecture(dense_layers=(), tied_embeddings=True),
    "dense": dense_architecture(),
    "dense, tied": dense_architecture(tied_embeddings=True),
}
NAMES = {
    "attention": r".*\.self_attn\.[qkvo]_proj\.weight",
    "mlp": r".*\.mlp\.(gate|up|down)_proj\.weight",
    "expert": r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight",
    "router": r".*\.mlp\.gate\.weight",
    "embedding": r"model\.embed_tokens\.weight",
    "head": r"lm_head\.weight",
}


def stress(arch: Architecture, seed: int = 0, **config: Any) -> WeightStress:
    made = read_stress(WeightsConfig.model_validate({"stress": config}).stress, arch, seed)
    assert made is not None
    return made


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_targets_choose_tensors_by_kind(arch: Architecture) -> None:
    names = hf_shapes(arch)
    assert stress(arch, kind="int8").names == {name for name in names if QUANTISED.fullmatch(name)}
    for target, pattern in NAMES.items():
        expected = {name for name in names if re.fullmatch(pattern, name)}
        assert stress(arch, kind="int8", targets=(target,)).names == expected
        assert (target in held_targets(arch)) == bool(expected)


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_targets_that_the_configuration_expects_are_those_of_the_weights(arch: Architecture) -> None:
    assert set(held_targets(arch)) == {target_of(weight) for weight in weights_of(arch)} - {None}


def test_kind_none_changes_nothing() -> None:
    assert read_stress(WeightsConfig().stress, moe_architecture(), 0) is None


def test_each_kind_changes_only_its_targets_and_noise_follows_version_name_and_seed() -> None:
    arch = moe_architecture(dense_layers=())
    weight = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    name, router = "model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.gate.weight"
    configs: list[dict[str, Any]] = [
        {"kind": "fp8"},
        {"kind": "fp8", "scale": "tensor"},
        {"kind": "int8"},
        {"kind": "int4"},
        {"kind": "noise", "size": 0.1},
    ]
    changed = []
    for config in configs:
        assert stress(arch, **config).change(router, weight, 1) is weight
        changed.append(stress(arch, **config).change(name, weight, 1))
        assert not torch.equal(changed[-1], weight)
    # A tensor that fits into one block has the same scale either way.
    assert torch.equal(changed[0], changed[1])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(changed[1:]))

    def noisy(name: str = name, version: int = 1, seed: int = 0) -> Tensor:
        return stress(arch, seed, kind="noise", size=0.1).change(name, weight, version)

    assert torch.equal(noisy(), noisy())
    others = [noisy(version=2), noisy(seed=1), noisy(name.replace("up", "gate"))]
    assert all(not torch.equal(noisy(), other) for other in others)


def test_a_scale_of_a_block_and_of_a_tensor_differ_for_a_large_tensor() -> None:
    arch = moe_architecture(dense_layers=())
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.self_attn.q_proj.weight"
    block, tensor = (stress(arch, kind="fp8", scale=scale).change(name, weight, 1) for scale in ("block", "tensor"))
    assert not torch.equal(block, tensor)


def test_buckets_are_changed_while_they_are_read_and_the_worst_error_is_reported() -> None:
    arch = moe_architecture(dense_layers=())
    shapes = hf_shapes(arch)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    read: list[str] = []

    def buckets() -> Iterator[list[tuple[str, Tensor]]]:
        for name, tensor in tensors.items():
            read.append(name)
            yield [(name, tensor.clone())]

    stressed = StressedBuckets(buckets(), stress(arch, kind="int4"), version=1)
    assert stressed.relative_error == 0
    found = iter(stressed)
    assert [next(found)[0][0] for _ in range(3)] == read
    changed = {name: tensor for bucket in stressed for name, tensor in bucket}
    assert list(changed) == list(tensors)[3:]
    assert {name for name, tensor in changed.items() if not torch.equal(tensor, tensors[name])} == {
        name for name in changed if QUANTISED.fullmatch(name)
    }
    errors = [
        float((stress(arch, kind="int4").change(name, tensor, 1) - tensor).double().norm() / tensor.double().norm())
        for name, tensor in tensors.items()
    ]
    assert stressed.relative_error == pytest.approx(max(errors))
    assert max(errors) > 0.05
