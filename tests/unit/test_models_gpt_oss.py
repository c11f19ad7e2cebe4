"""gpt-oss: its published config.json, and tensors that stack experts, with gate and up interleaved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import make_family_model
from hypothesis import given
from hypothesis import strategies as st
from model_directories import files_of, shards_of
from paths import ROOT
from torch import Tensor

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.engine.export import _buckets
from megatron_rl.models.architecture import Architecture, ClampedSwiglu, Yarn, read_architecture
from megatron_rl.models.fields import ModelError
from megatron_rl.models.registry import tensors_of, weights_of
from megatron_rl.models.shards import assemble
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Part, Source
from megatron_rl.weights.quantise import round_to_fp8
from megatron_rl.weights.stressed import read_stress

LAYERS = ["sliding_attention", "full_attention"] * 12
CONFIG = ROOT / "tests" / "families" / "published" / "openai--gpt-oss-20b.json"
PUBLISHED: dict[str, Any] = json.loads(CONFIG.read_text())


def read(directory: Path, **changes: Any) -> Architecture:
    fields = {name: value for name, value in {**PUBLISHED, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(fields))
    return read_architecture(directory)


# ---- config.json -----------------------------------------------------------------------------------------------


def test_the_published_configuration_is_read(tmp_path: Path) -> None:
    arch = read(tmp_path)
    assert (arch.num_experts, arch.experts_per_token, arch.expert_hidden_size) == (32, 4, 2880)
    assert (arch.biases, arch.sinks, arch.clamped) == (True, True, ClampedSwiglu(alpha=1.702, limit=7.0))
    assert arch.windowed_layers == tuple(range(0, 24, 2))
    assert [arch.window_of(layer) for layer in (0, 1, 22, 23)] == [128, None, 128, None]
    assert isinstance(arch.rope_scaling, Yarn)
    assert not arch.rope_scaling.truncate
    assert not arch.router.pre_softmax
    assert read(tmp_path, layer_types=...) == read(tmp_path, swiglu_alpha=1.702) == arch
    assert read(tmp_path, layer_types=["full_attention"] * 24, sliding_window=...).window is None


def test_the_model_has_as_many_weights_as_published(tmp_path: Path) -> None:
    total = sum(torch.Size(source.whole.shape).numel() for source, *_ in tensors_of(read(tmp_path)))
    assert total == 20_914_757_184  # 21B by its model card


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_bias": False}, "attention_bias is False; expected true"),
        ({"sliding_window": ...}, "sliding_window is missing"),
        ({"sliding_window": None}, "sliding_window is None; expected an integer"),
        ({"sliding_window": 0}, "sliding_window is 0; expected an integer"),
        ({"layer_types": LAYERS[1:]}, "layer_types is .* for each layer"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types is .*sliding_attention or full_attention"),
        ({"layer_types": [[]] * 24}, "layer_types is .*sliding_attention or full_attention"),
        ({"swiglu_limit": None}, "swiglu_limit is None; expected a number"),
    ],
)
def test_other_configurations_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        read(tmp_path, **change)


# ---- stacked tensors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(
        tmp_path_factory.mktemp("stacked") / "model", "gpt_oss", num_hidden_layers=2, layer_types=LAYERS[:2]
    )


def expected(files: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    """Returns gate over up, down and their biases of an expert, as Megatron-Core has them."""
    own = {name: files[f"model.layers.{layer}.mlp.experts.{name}"][expert] for name in ("gate_up_proj", "down_proj")}
    biases = {name: files[f"model.layers.{layer}.mlp.experts.{name}_bias"][expert] for name in own}
    pairs = own["gate_up_proj"].t().unflatten(0, (-1, 2))
    return {
        "linear_fc1.weight": pairs.transpose(0, 1).flatten(0, 1),
        "linear_fc1.bias": biases["gate_up_proj"].unflatten(0, (-1, 2)).t().flatten(),
        "linear_fc2.weight": own["down_proj"].t(),
        "linear_fc2.bias": biases["down_proj"],
    }


def test_an_expert_is_cut_out_of_the_stacked_tensors(model: Path) -> None:
    arch, files = read_architecture(model), files_of(model)
    weights = {weight.name: weight for weight in weights_of(arch)}
    for layer, expert in ((0, 0), (1, 5)):
        for name, wanted in expected(files, layer, expert).items():
            weight = weights[f"decoder.layers.{layer}.mlp.experts.{name}{expert}"]
            (whole,) = shards_of(weight, TensorFiles(model), 1)
            assert torch.equal(whole, wanted), name
            shards = shards_of(weight, TensorFiles(model), 2)
            dim = weight.sharding.dim
            if name.startswith("linear_fc1"):
                gate, up = (half.chunk(2) for half in wanted.chunk(2))
                assert all(torch.equal(shards[n], torch.cat((gate[n], up[n]))) for n in (0, 1)), name
            else:
                assert torch.equal(torch.cat(shards, dim), wanted), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shards_of_all_experts_are_the_stacked_tensors(model: Path, size: int) -> None:
    arch, read = read_architecture(model), TensorFiles(model)
    found = assemble((weight, shards_of(weight, read, size)) for weight in weights_of(arch))
    files = files_of(model)
    assert [name for name, _ in found] == [source.name for source, *_ in tensors_of(arch)]
    assert files.keys() == dict(found).keys()
    assert all(torch.equal(tensor, files[name]) for name, tensor in found)


@pytest.mark.parametrize("elements", [1, 1000, 10**5, 10**9])
def test_a_bucket_has_all_parts_of_a_tensor(model: Path, elements: int) -> None:
    weights = weights_of(read_architecture(model))
    buckets = _buckets(weights, elements)
    assert [weight for bucket in buckets for weight in bucket] == weights
    names = [{source.name for weight in bucket for source in weight.sources} for bucket in buckets]
    assert sum(map(len, names)) == len(set.union(*names))
    assert len(buckets) == {1: len(set.union(*names)) - 8, 10**9: 1}.get(
        elements, len(buckets)
    )  # q, k, v are one weight


@given(st.data())
def test_each_stretch_of_a_part_is_read(model: Path, data: st.DataObject) -> None:
    files, arch = TensorFiles(model), read_architecture(model)
    stacked = [source for weight in weights_of(arch) for source in weight.sources if source.part is not None]
    source = data.draw(st.sampled_from(stacked))
    dim = data.draw(st.integers(0, len(source.shape) - 1))
    start = data.draw(st.integers(0, source.shape[dim] - 1))
    length = data.draw(st.integers(1, source.shape[dim] - start))
    whole = source.of(files_of(model)[source.name])
    assert tuple(whole.shape) == source.shape
    assert torch.equal(files.read(source, dim, start, length), whole.narrow(dim, start, length))


def test_a_stacked_tensor_of_another_shape_is_refused(model: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ModelError, match=r"down_proj has shape \(8, 48, 64\); config.json asks for \(8, 32, 64\)"):
        TensorFiles(model).check(Source(name, (64, 32), Part((8, 32, 64), 0, transposed=True)))


def test_stress_rounds_each_experts_gate_up_and_down(model: Path) -> None:
    stress = read_stress(
        WeightsConfig.model_validate({"stress": {"kind": "fp8", "scale": "tensor"}}).stress, read_architecture(model), 0
    )
    assert stress is not None
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before = files_of(model)[name]
    after = stress.change(name, before, 0)
    for expert in range(8):
        for offset in (0, 1):
            matrix = before[expert, :, offset::2].t()
            assert torch.equal(after[expert, :, offset::2].t(), round_to_fp8(matrix, None))
    assert name.replace("proj", "proj_bias") not in stress.names


def test_kinds_of_sinks_and_biases(model: Path) -> None:
    kinds = {
        source.name.removeprefix("model.layers.0."): kind
        for (source, *_), kind in tensors_of(read_architecture(model)).items()
    }
    assert kinds["self_attn.sinks"] == kinds["self_attn.o_proj.bias"] == kinds["self_attn.q_proj.bias"] == "attention"
    assert kinds["mlp.router.bias"] == kinds["mlp.router.weight"] == "router"
    assert kinds["mlp.experts.down_proj_bias"] == kinds["mlp.experts.gate_up_proj"] == "expert"
