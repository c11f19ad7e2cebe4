"""Weights in mxfp4 are read as what transformers takes them for, whichever stretch is read. Files that do not fit are
errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import make_family_model
from hypothesis import given
from hypothesis import strategies as st
from model_directories import edit, files_of
from quantised_models import set_config
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.dequantise import Dequantised, dequantise
from megatron_rl.models.fields import ModelError
from megatron_rl.models.mxfp4 import decode_blocks
from megatron_rl.models.quantisation import Mxfp4, read_quantisation
from megatron_rl.models.registry import weights_of
from megatron_rl.models.tensor_files import TensorFiles

DOWN = "model.layers.0.mlp.experts.down_proj"
Change = Callable[[dict[str, Tensor]], object]


def quantise(tensors: dict[str, Tensor]) -> None:
    """Replaces the matrices of experts by random blocks and scales, as publishers store them."""
    made = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=made)
        tensors[f"{name}_scales"] = torch.randint(115, 126, shape, dtype=torch.uint8, generator=made)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = ["sliding_attention", "full_attention"]
    directory = make_family_model(
        tmp_path_factory.mktemp("mxfp4") / "model", "gpt_oss", num_hidden_layers=2, layer_types=layers,
        hidden_size=96, intermediate_size=64,
    )  # fmt: skip
    edit(directory, quantise)
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_config(directory, quantization_config={"modules_to_not_convert": modules, "quant_method": "mxfp4"})
    return directory


def meaning(directory: Path) -> dict[str, Tensor]:
    """Returns the weights that the files stand for, by transformers."""
    files = files_of(directory)
    found = {name: tensor for name, tensor in files.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in files if name.endswith("_blocks")):
        found[name] = convert_moe_packed_tensors(files[f"{name}_blocks"], files[f"{name}_scales"])
    return found


def test_all_bytes_and_exponents_are_decoded_as_by_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 254, 1, 1)
    scales = torch.arange(1, 255, dtype=torch.uint8).view(1, 254, 1).repeat(1, 1, 16)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(decode_blocks(blocks, scales), theirs)
    one = torch.tensor([[0x21] + [0] * 15], dtype=torch.uint8)
    assert decode_blocks(one, torch.tensor([128], dtype=torch.uint8))[:3].tolist() == [1.0, 2.0, 0.0]


@given(st.data())
def test_the_files_give_each_stretch(published: Path, data: st.DataObject) -> None:
    sources = [s for w in weights_of(read_architecture(published)) for s in w.sources if s.part and len(s.shape) == 2]
    source = data.draw(st.sampled_from(sources))
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.sampled_from([0, 31, 32, 33]) | st.integers(0, source.shape[dim] - 1))
    length = data.draw(st.integers(1, source.shape[dim] - start))
    whole = source.of(meaning(published)[source.name]).float()
    assert torch.equal(TensorFiles(published).read(source, dim, start, length), whole.narrow(dim, start, length))


def test_the_copy_in_bf16_stands_for_the_same_weights(published: Path, tmp_path: Path) -> None:
    assert read_quantisation(published) == Mxfp4()
    check_weights(published, values=True)
    expected = meaning(published)
    assert dequantise(published, tmp_path / "out") == Dequantised(4, len(expected) - 4)
    copy = files_of(tmp_path / "out")
    assert copy.keys() == expected.keys()
    assert all(torch.equal(copy[name], tensor) for name, tensor in expected.items())
    assert copy[DOWN].dtype == torch.bfloat16
    assert read_quantisation(tmp_path / "out") is None
    assert read_architecture(tmp_path / "out") == read_architecture(published)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), f"tensor {DOWN}_scales is missing"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:1]}), "has shape (1, 96, 2); expected (8, 96, 2)"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"].float()}), "has dtype F32; expected U8"),
        (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"][:1]}), "has shape (1, 96, 2, 16); config.json asks"),
        (lambda t: t[f"{DOWN}_scales"].fill_(255), f"{DOWN} holds NaN or infinity"),
        (lambda t: t.update({DOWN: torch.ones(8, 64, 96)}), f"{DOWN}_blocks, {DOWN}_scales has no place in the"),
        (lambda t: t.update({"other_blocks": t[f"{DOWN}_blocks"].clone()}), "other has no place in the gpt_oss model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(published: Path, tmp_path: Path, change: Change, told: str) -> None:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, change)
    with pytest.raises(ModelError) as refused:
        check_weights(tmp_path, values=True)
    assert told in str(refused.value)


def test_mxfp4_without_a_word_in_config_json_is_refused(published: Path, tmp_path: Path) -> None:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    set_config(tmp_path, quantization_config=None)
    with pytest.raises(ModelError, match=r"config\.json has no quantization_config of mxfp4; take"):
        check_weights(tmp_path)
