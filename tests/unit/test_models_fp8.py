"""Weights in fp8 are read as what they stand for, whichever stretch is read. Files that do not fit are errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_directories import K_PROJ, edit, empty_stage, files_of, make, whole
from models_reference import chunk_parameters, weight_names
from quantised_models import published, quantise, quantise_model, set_config, values_of
from safetensors.torch import save_file
from tiny_models import make_tiny_model
from torch import Tensor

from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.binding import ModelRanks
from megatron_rl.models.check import check_weights
from megatron_rl.models.fields import ModelError
from megatron_rl.models.fp8 import decode, touched
from megatron_rl.models.quantisation import Fp8Blocks
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Source
from megatron_rl.models.weights_io import load_weights, save_weights

SCALES = f"{K_PROJ}_scale_inv"
Change = Callable[[dict[str, Tensor]], object]


def make_weight(shape: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns fp8 values, scales that differ from block to block, and the weight that they stand for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    values, scales = quantise(weight, size, dtype)
    return values, scales, values_of(values, scales, size)


# ---- stretches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 11), (8, 9), (1, 3), (4, 1)])
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (100, 2)])
def test_each_stretch_is_a_part_of_the_whole(shape: tuple[int, int], size: tuple[int, int]) -> None:
    values, scales, weight = make_weight(shape, size, torch.float32)
    for dim, extent in enumerate(shape):
        for start in range(extent):
            for length in range(1, extent - start + 1):
                needed = scales.narrow(dim, *touched(size[dim], start, length))
                found = decode(values.narrow(dim, start, length), needed, Fp8Blocks(size), dim, start)
                assert torch.equal(found, weight.narrow(dim, start, length)), (dim, start, length)
                assert found.dtype == torch.float32


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def published_weight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A directory with one weight of 3 x 2 blocks of 128 x 128, smaller at the edges."""
    directory = tmp_path_factory.mktemp("fp8")
    values, scales, weight = make_weight((300, 200), (128, 128), request.param)
    assert scales.shape == (3, 2)
    save_file({"w": values, "w_scale_inv": scales}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    set_config(directory, quantization_config=published())
    return directory, weight


@given(data=st.data())
def test_the_files_give_each_stretch(published_weight: tuple[Path, Tensor], data: st.DataObject) -> None:
    directory, weight = published_weight
    dim = data.draw(st.integers(0, 1))
    near_edges = st.sampled_from([n for n in (0, 127, 128, 129, 255, 256, 257) if n < weight.shape[dim]])
    start = data.draw(near_edges | st.integers(0, weight.shape[dim] - 1))
    length = data.draw(st.integers(1, weight.shape[dim] - start))
    found = TensorFiles(directory).read(Source("w", (300, 200)), dim, start, length)
    assert torch.equal(found, weight.narrow(dim, start, length))
    assert found.dtype == torch.float32


# ---- whole models ----------------------------------------------------------------------------------------------


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Path, Architecture, dict[str, Tensor]]:
    """A model with widths that are no multiples of 128: directory, architecture, and what its weights stand for."""
    directory = make_tiny_model(
        tmp_path / "fp8", num_layers=2, hidden_size=192, num_kv_heads=2, head_dim=72, num_experts=4,
        expert_hidden_size=136, ffn_hidden_size=200, mlp_only_layers=[1], dtype=torch.bfloat16,
    )  # fmt: skip
    before = read_architecture(directory)
    meaning = quantise_model(directory)
    assert read_architecture(directory) == before
    return directory, before, meaning


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_in_small_blocks_is_loaded(tmp_path: Path, sharded: bool) -> None:
    directory, arch = make(tmp_path / "hf", "qwen3_moe", sharded=sharded)
    expected = chunk_parameters(quantise_model(directory, (5, 7)), arch, range(arch.num_layers))
    check_weights(directory, values=True)
    stage = empty_stage(arch)
    assert load_weights([stage], arch, directory, ModelRanks(), weight_names()) == ()
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_each_rank_gets_its_shard(quantised: tuple[Path, Architecture, dict[str, Tensor]]) -> None:
    """Shards of queries, experts and columns begin within blocks."""
    directory, arch, meaning = quantised
    for rank in (0, 1):
        shares: dict[str, Any] = dict.fromkeys(("tp", "ep", "etp"), (rank, 2))
        ranks = ModelRanks(tp_rank=rank, tp_size=2, ep_rank=rank, ep_size=2, etp_rank=rank, etp_size=2)
        stage = empty_stage(arch, **shares)
        load_weights([stage], arch, directory, ranks, weight_names())
        floats = {name: tensor.float() for name, tensor in meaning.items()}
        for name, tensor in chunk_parameters(floats, arch, range(arch.num_layers), **shares).items():
            assert torch.equal(stage.get_parameter(name), tensor), name


def test_a_bf16_parameter_is_rounded_once(quantised: tuple[Path, Architecture, dict[str, Tensor]]) -> None:
    directory, arch, meaning = quantised
    stage = empty_stage(arch, dtype=torch.bfloat16)
    load_weights([stage], arch, directory, ModelRanks(), weight_names())
    rounded = {name: tensor.bfloat16() for name, tensor in meaning.items()}
    for name, tensor in chunk_parameters(rounded, arch, range(arch.num_layers)).items():
        assert torch.equal(stage.get_parameter(name), tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_saved_is_not_quantised(
    quantised: tuple[Path, Architecture, dict[str, Tensor]], tmp_path: Path, dtype: torch.dtype
) -> None:
    directory, arch, meaning = quantised
    stage = empty_stage(arch)
    load_weights([stage], arch, directory, ModelRanks(), weight_names())
    save_weights(whole(stage, arch), tmp_path / "saved", directory, 10**9, dtype)
    saved = files_of(tmp_path / "saved")
    assert saved.keys() == meaning.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, meaning[name].to(dtype)), name
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    check_weights(tmp_path / "saved", values=True)


def test_scales_of_tensors_that_are_not_used_are_no_strangers(tmp_path: Path) -> None:
    directory, arch = make(tmp_path / "hf", "qwen3")
    quantise_model(directory)
    values, scales = quantise(files_of(directory)["model.embed_tokens.weight"], (128, 128))
    edit(directory, lambda t: t.update({"lm_head.weight": values, "lm_head.weight_scale_inv": scales}))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())


# ---- files that do not fit -------------------------------------------------------------------------------------


def refusal(directory: Path, *, values: bool = False) -> str:
    """Returns the error of check_weights, which load_weights raises too; it fits on a screen."""
    arch = read_architecture(directory)
    with pytest.raises(ModelError) as checked:
        check_weights(directory, values=values)
    with pytest.raises(ModelError) as loaded:
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())
    assert str(loaded.value) == str(checked.value)
    assert len(str(checked.value).replace(str(directory), "")) < 300
    return str(checked.value)


def broken(tmp_path: Path, change: Change) -> Path:
    directory, _ = make(tmp_path / "hf", "qwen3_moe")
    quantise_model(directory, (5, 7))
    edit(directory, change)
    return directory


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(SCALES), f"tensor {SCALES} is missing; {K_PROJ} is in fp8, and those are its scales"),
        (lambda t: t.update({SCALES: torch.ones(3, 4)}), f"{SCALES} has shape (3, 4); {K_PROJ} has (4, 3) blocks"),
        (lambda t: t.update({SCALES: torch.ones(4)}), f"{SCALES} has shape (4,); {K_PROJ} has (4, 3) blocks"),
        (lambda t: t.update({SCALES: torch.ones(())}), f"{SCALES} has shape (); {K_PROJ} has (4, 3) blocks"),
        (
            lambda t: t.update({SCALES: torch.ones(4, 3, dtype=torch.uint8)}),
            f"{SCALES} has dtype U8; expected one of F32, BF16",
        ),
        (
            lambda t: t.update({K_PROJ: torch.ones(16, 16, dtype=torch.bfloat16)}),
            f"{SCALES} has no place in the qwen3_moe model",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
            "model.norm.weight has dtype F8_E4M3 and shape (16,); only matrices have scales per block",
        ),
        (
            lambda t: [t.pop(SCALES), t.update({K_PROJ: torch.ones(16, 16).to(torch.float8_e5m2)})],
            f"{K_PROJ} has dtype F8_E5M2; expected one of F32, F16, BF16, F8_E4M3",
        ),
        (
            lambda t: t.update({K_PROJ: torch.ones(8, 16).to(torch.float8_e4m3fn)}),
            f"{K_PROJ} has shape (8, 16); config.json asks for (16, 16)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: Change, told: str) -> None:
    assert told in refusal(broken(tmp_path, change))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_refused(tmp_path: Path, scale: float) -> None:
    directory = broken(tmp_path, lambda t: t[SCALES][-1, -1].fill_(scale))
    check_weights(directory)  # the headers are those of a complete model
    assert f"{SCALES} holds a scale that is not a finite number above 0" in refusal(directory, values=True)


def test_a_value_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    directory = broken(tmp_path, lambda t: t[K_PROJ].view(torch.uint8)[-1, -1].fill_(0x7F))
    assert f"{K_PROJ} holds NaN or infinity" in refusal(directory, values=True)


def test_fp8_without_a_word_in_config_json_is_refused(tmp_path: Path) -> None:
    directory = broken(tmp_path, lambda t: t)
    set_config(directory, quantization_config=None)
    told = (
        " has dtype F8_E4M3, but config.json has no quantization_config; take config.json and weights from one source"
    )
    assert told in refusal(directory)
