"""Hugging Face directories that are damaged, inconsistent or not finite are refused, and the error names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_directories import K_PROJ, edit, empty_stage, make_sharded
from models_reference import hf_shapes, weight_names
from safetensors.torch import load_file, save_file

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks
from megatron_rl.models.check import check_files, check_model, check_weights
from megatron_rl.models.fields import ModelError
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weights_io import load_weights


def refusal(directory: Path, arch: Architecture) -> str:
    """Returns the error that both check_weights and load_weights raise; the first runs before anything is built."""
    with pytest.raises(ModelError) as loaded:
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())
    with pytest.raises(ModelError) as checked:
        check_weights(directory, values=True)
    assert str(checked.value).split(": ")[0] == str(loaded.value).split(": ")[0]
    return str(loaded.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_error_names_a_non_finite_weight(moe, dtype, bad):
    directory, arch = moe
    name = "model.layers.2.mlp.experts.3.down_proj.weight"

    def change(tensors):
        tensors.update({n: t.to(dtype) for n, t in tensors.items()})
        tensors[name][-1, -1] = bad

    edit(directory, change)
    expected = f"{directory / 'model.safetensors'}: {name} holds NaN or infinity; "
    assert refusal(directory, arch).startswith(expected)
    check_weights(directory)  # the headers are those of a complete model


def test_every_tensor_is_checked_for_non_finite_values(moe):
    directory, arch = moe
    for name in hf_shapes(arch):
        whole_file = (directory / "model.safetensors").read_bytes()
        edit(directory, lambda t, name=name: t[name].view(-1)[0].fill_(float("nan")))
        with pytest.raises(ModelError, match=rf"{name} holds NaN"):
            load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())
        (directory / "model.safetensors").write_bytes(whole_file)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, "puts model.embed_tokens.weight in '5'; expected the name of a .safetensors file in the same directory"),
        (None, "in 'None'; expected the name"),
        (["a.safetensors"], "expected the name of a .safetensors file"),
        ("", "in ''; expected the name"),
        ("../outside.safetensors", "in '../outside.safetensors'; expected the name of a .safetensors file in the same"),
        ("/etc/passwd", "in '/etc/passwd'; expected"),
        ("sub/x.safetensors", "in 'sub/x.safetensors'; expected"),
        ("a\0.safetensors", "expected the name of a .safetensors file"),
        ("\ud800.safetensors", "expected the name of a .safetensors file"),
        ("pytorch_model.bin", "in 'pytorch_model.bin'; expected"),
        ("x" * 5000 + ".safetensors", "expected the name of a .safetensors file"),
        ("absent.safetensors", "lists absent.safetensors, which does not exist"),
        ("folder.safetensors", "folder.safetensors is not a whole safetensors file"),
    ],
)
def test_an_index_that_points_outside_its_directory_is_refused(tmp_path, value, told):
    directory, arch = make_sharded(tmp_path / "hf")
    save_file({"model.embed_tokens.weight": torch.zeros(37, 16)}, tmp_path / "outside.safetensors")
    (directory / "folder.safetensors").mkdir()
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.embed_tokens.weight"] = value
    index.write_text(json.dumps(content))
    assert told in refusal(directory, arch)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"weight_map": {}}', "is not an index: expected an object weight_map"),
        ('{"weight_map": []}', "is not an index"),
        ('{"metadata": {}}', "is not an index"),
        ("{", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON: nested too deep"),
        ('{"a": ' * 100000, "is not valid JSON: nested too deep"),
        ('{"weight_map": {"a": 1' + "0" * 5000 + "}}", "is not valid JSON: Exceeds the limit"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a is given twice; keep one"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path, text, told):
    directory, arch = make_sharded(tmp_path / "hf")
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    assert told in refusal(directory, arch)
    (directory / "model.safetensors.index.json").write_bytes(b'{"weight_map": "\xff"}')
    assert "is not valid JSON" in refusal(directory, arch)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    directory, _ = make_sharded(tmp_path / "hf")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))[:2]
    name = next(n for n, file in index.items() if file == first)
    save_file(load_file(directory / second) | {name: torch.zeros(2)}, directory / second)
    with pytest.raises(ModelError, match=f"{second}: tensor {name} is in it; .* puts it in {first}"):
        check_weights(directory)
    save_file(load_file(directory / first) | {"stranger": torch.zeros(2)}, directory / first)
    with pytest.raises(ModelError, match=f"{first}: tensor stranger is in it; .* puts it nowhere"):
        check_weights(directory)


def test_headers_are_checked_before_anything_is_built(moe):
    directory, _ = moe
    edit(directory, lambda t: t.update({K_PROJ: torch.zeros(8, 16)}))
    with pytest.raises(ModelError, match=rf"{K_PROJ} has shape \(8, 16\); .* \(16, 16\)"):
        check_weights(directory)
    edit(directory, lambda t: t.update({K_PROJ: torch.zeros(16, 16, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=rf"{K_PROJ} has dtype I8"):
        check_weights(directory)
    edit(directory, lambda t: t.pop(K_PROJ))
    with pytest.raises(ModelError, match=rf"{K_PROJ} missing"):
        check_weights(directory)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda d: [(d / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
            "holds neither tokenizer.json",
        ),
        (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), "its tokenizer cannot be loaded: "),
        (lambda d: (d / "tokenizer.json").write_text("["), "its tokenizer cannot be loaded: "),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "its tokenizer cannot be loaded: "),
        (lambda d: (d / "tokenizer_config.json").write_bytes(b"\xff"), "its tokenizer cannot be loaded: "),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_refused(moe, damage, told):
    directory, _ = moe
    check_model(directory)
    check_files(directory)
    damage(directory)
    for check in (check_model, check_files):
        with pytest.raises(ModelError) as caught:
            check(directory)
        assert str(caught.value).startswith(f"{directory}")
        assert told in str(caught.value)


def test_weight_errors_are_user_errors(tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            check_weights(missing)
    with pytest.raises(UserError):
        TensorFiles(tmp_path)
