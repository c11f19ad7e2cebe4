"""Qwen3.5: files with experts stacked or one by one, projections joined by kind, and a vision tower that is copied."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from family_models import make_family_model
from hypothesis import given
from hypothesis import strategies as st
from model_directories import edit, files_of, shards_of
from quantised_models import quantise_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.dequantise import dequantise
from megatron_rl.models.fields import ModelError
from megatron_rl.models.graft import graft
from megatron_rl.models.registry import tensors_of, weights_of
from megatron_rl.models.shards import assemble
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weights_io import save_weights

LAYER = "model.language_model.layers.0"
GATE_UP = f"{LAYER}.mlp.experts.gate_up_proj"
IMAGES = "model.visual.patch_embed.proj.weight"
PREDICTOR = "mtp.norm.weight"
KEYS, VALUES = 4 * 16, 8 * 8  # outputs of a delta network's projections


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes a model that it made itself: a tensor for each expert."""
    directory = make_family_model(tmp_path_factory.mktemp("alone") / "model", "qwen3_5_moe")
    edit(directory, lambda tensors: tensors.update({PREDICTOR: torch.full((3,), torch.inf)}))
    return directory


def export(directory: Path, out: Path, size: int = 1) -> Path:
    """Reads every rank's shards of the model, and writes what they are together."""
    files = TensorFiles(directory)
    weights = weights_of(read_architecture(directory))
    tensors = assemble((weight, shards_of(weight, files, size)) for weight in weights)
    save_weights(tensors, out, directory, 10**9, torch.float32)
    return out


@pytest.fixture(scope="module", params=[1, 2, 4])
def stacked(request: pytest.FixtureRequest, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: an export of so many ranks."""
    return export(alone, tmp_path_factory.mktemp("stacked") / "model", request.param)


def parameters_of(directory: Path) -> dict[str, Tensor]:
    return dict(AutoModelForImageTextToText.from_pretrained(directory).named_parameters())


def test_the_export_is_the_model_and_stacks_its_experts(alone: Path, stacked: Path) -> None:
    assert f"{LAYER}.mlp.experts.0.gate_proj.weight" in files_of(alone)
    assert files_of(stacked)[GATE_UP].shape == (8, 2 * 48, 64)
    expected, found = parameters_of(alone), parameters_of(stacked)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_what_does_not_train_is_copied(alone: Path, stacked: Path) -> None:
    """The vision tower, and layers that predict several tokens, whatever they hold."""
    before, after = files_of(alone), files_of(stacked)
    for name in [name for name in before if name.startswith("model.visual.")] + [PREDICTOR]:
        assert torch.equal(after[name], before[name]), name


def test_stacked_experts_are_exported_as_they_were(stacked: Path, tmp_path: Path) -> None:
    before, after = files_of(stacked), files_of(export(stacked, tmp_path / "again", 2))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_rank_has_each_of_its_key_heads_with_its_values(alone: Path) -> None:
    files = files_of(alone)
    qkv, z, b, a = (files[f"{LAYER}.linear_attn.in_proj_{name}.weight"] for name in ("qkv", "z", "b", "a"))
    query, key, value = qkv.split((KEYS, KEYS, VALUES))
    heads = [x.chunk(4) for x in (query, key, value, z, b, a)]
    expected = torch.cat([part for head in zip(*heads, strict=True) for part in head])
    (weight,) = (
        w for w in weights_of(read_architecture(alone)) if w.name.endswith("layers.0.self_attention.in_proj.weight")
    )
    assert torch.equal(torch.cat(shards_of(weight, TensorFiles(alone), 2)), expected)


@given(st.data())
def test_each_stretch_of_a_part_is_read(stacked: Path, data: st.DataObject) -> None:
    files = TensorFiles(stacked)
    parts = [source for parts in tensors_of(read_architecture(stacked)) for source in parts if source.part is not None]
    source = data.draw(st.sampled_from(parts))
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, source.shape[dim] - 1))
    length = data.draw(st.integers(1, source.shape[dim] - start))
    whole = source.of(files_of(stacked)[source.name])
    assert torch.equal(files.read(source, dim, start, length), whole.narrow(dim, start, length))


def test_an_export_has_what_processors_of_images_need_and_one_dtype(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    out = export(tmp_path / "model", tmp_path / "out")
    assert (out / "preprocessor_config.json").exists()
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("mtp.fc.weight", torch.zeros(4, 4).to(torch.float8_e4m3fn), "but config.json has no quantization_config"),
        ("mtp.fc_blocks", torch.zeros(4, dtype=torch.uint8), "is in mxfp4, and no weight of the model"),
    ],
)
def test_what_cannot_be_copied_is_found_before_the_training(
    alone: Path, tmp_path: Path, name: str, tensor: Tensor, message: str
) -> None:
    shutil.copytree(alone, tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path / "model")


def test_experts_of_several_dtypes_are_stacked_in_the_widest(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "model")
    name = f"{LAYER}.mlp.experts.0.gate_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    graft(alone, tmp_path / "model", tmp_path / "out", ["router"])
    found = files_of(tmp_path / "out")[GATE_UP]
    assert found.dtype == torch.float32
    assert torch.equal(found[3, :48], files_of(alone)[f"{LAYER}.mlp.experts.3.gate_proj.weight"])


# ---- quantised -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """As the files in fp8 are published, one expert by one, and the weights that they stand for."""
    directory = tmp_path_factory.mktemp("fp8") / "model"
    shutil.copytree(alone, directory)
    return directory, quantise_model(directory, (24, 40))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_an_fp8_weight_has_the_scales_of_its_rows(
    quantised: tuple[Path, dict[str, Tensor]], dim: int
) -> None:
    directory, meaning = quantised
    name = f"{LAYER}.linear_attn.in_proj_qkv.weight"
    (parts,) = (parts for parts in tensors_of(read_architecture(directory)) if parts[0].name == name)
    for part in parts:  # of 64 rows, and blocks of 24
        for start, length in ((0, part.shape[dim]), (5, 30)):
            found = TensorFiles(directory).read(part, dim, start, length)
            assert torch.equal(found, part.of(meaning[name]).narrow(dim, start, length))


def test_the_copy_in_bf16_stacks_experts(quantised: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, meaning = quantised
    done = dequantise(directory, tmp_path / "out")
    copy = files_of(tmp_path / "out")
    assert done.converted + done.kept == len(tensors_of(read_architecture(directory)))
    assert copy[GATE_UP].dtype == torch.bfloat16
    for expert in range(8):
        pair = [meaning[f"{LAYER}.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(copy[GATE_UP][expert], torch.cat(pair).bfloat16())
    assert torch.equal(copy[IMAGES], meaning[IMAGES])
    check_weights(tmp_path / "out", values=True)


# ---- other tools -----------------------------------------------------------------------------------------------


def test_a_graft_takes_stacked_experts_from_either_kind_of_file(alone: Path, stacked: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(stacked, edited)
    edit(edited, lambda tensors: [tensor.add_(1) for name, tensor in tensors.items() if "visual" not in name])
    graft(alone, edited, tmp_path / "out", ["expert"])
    found, expected = files_of(tmp_path / "out"), files_of(edited) | {GATE_UP: files_of(stacked)[GATE_UP]}
    for name in (GATE_UP, f"{LAYER}.mlp.gate.weight", IMAGES):
        assert torch.equal(found[name], expected[name]), name


def test_a_missing_expert_is_named(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "model")
    name = f"{LAYER}.mlp.experts.3.up_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"safetensors: {re.escape(name)} missing; config\.json asks for it"):
        check_weights(tmp_path / "model")
