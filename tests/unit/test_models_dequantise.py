"""What config.json may say of quantised weights, the copy in bf16, and who asks for one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import MODEL_FIELDS, RL, SFT, write, write_model
from model_directories import edit, files_of
from quantised_models import published, quantise_model, set_config
from small_disk import small_disk
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.load import ConfigError
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.disk import DiskError
from megatron_rl.errors import FileInTheWayError
from megatron_rl.models import dequantise as module
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.dequantise import Dequantised, dequantise
from megatron_rl.models.fields import ModelError
from megatron_rl.models.graft import graft
from megatron_rl.models.quantisation import Fp8Blocks, read_quantisation
from megatron_rl.parity import run as run_parity

Quantised = tuple[Path, dict[str, Tensor]]
MANY = [f"model.layers.{layer}.mlp.gate" for layer in range(500)]


@pytest.fixture
def quantised(tmp_path: Path) -> Quantised:
    """A model in fp8 with bf16 norms and fp32 routers, and what its weights stand for."""
    directory = make_tiny_model(
        tmp_path / "fp8", hidden_size=160, num_experts=2, expert_hidden_size=136, dtype=torch.bfloat16
    )
    routers = {name: tensor.float() for name, tensor in files_of(directory).items() if "mlp.gate." in name}
    edit(directory, lambda t: t.update(routers))
    return directory, quantise_model(directory)


# ---- config.json -----------------------------------------------------------------------------------------------


def with_config(directory: Path, content: Any) -> Path:
    write(directory / "config.json", json.dumps({**MODEL_FIELDS, "quantization_config": content}))
    return directory


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_not_convert": MANY},
        {"ignored_layers": ["lm_head"], "modules_to_convert": None},  # transformers 5, from MiniMax's files
        {"fmt": "float8_e4m3fn"},  # MiniMax-M2
        {"scale_fmt": "ue8m0"},  # DeepSeek-V3.1
        {"scale_fmt": "float", "dequantize": False},  # transformers 5
    ],
)
def test_published_configurations_are_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    plain = read_architecture(write_model(tmp_path / "plain"))
    directory = with_config(tmp_path, published(**fields))
    assert read_quantisation(directory) == Fp8Blocks((128, 128))
    assert read_architecture(directory) == plain
    assert read_quantisation(with_config(tmp_path, published((64, 32)))) == Fp8Blocks((64, 32))


def test_a_model_without_the_field_is_not_quantised(tmp_path: Path) -> None:
    assert read_quantisation(write_model(tmp_path / "plain")) is None
    assert read_quantisation(with_config(tmp_path, None)) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("fp8", "quantization_config is 'fp8'; expected an object, or null"),
        ([], "quantization_config is []; expected an object"),
        ({}, '.quant_method is None; expected "fp8" or "mxfp4"; no other value is supported'),
        ({"quant_method": "awq", "modules_to_not_convert": MANY}, ".quant_method is 'awq'; expected"),
        ({"quant_method": ["fp8"] * 1000}, ".quant_method is ['fp8', 'fp8'"),
        (published(fmt="e5m2"), ".fmt is 'e5m2'; expected \"e4m3\" or"),
        (published(activation_scheme="static"), ".activation_scheme is 'static'; expected \"dynamic\""),
        (published(scale_fmt="e8m0"), ".scale_fmt is 'e8m0'; expected"),
        (published(dequantize="yes"), ".dequantize is 'yes'; expected false or true"),
        (published(weight_block_size=None), "such as [128, 128]; one scale for a whole tensor is not supported"),
        (published(weight_block_size=[128]), ".weight_block_size is [128]; expected rows and columns"),
        (published(weight_block_size=[128, 0]), ".weight_block_size is [128, 0]; expected"),
        (published(weight_block_size=[128.0, 128]), ".weight_block_size is [128.0, 128]; expected"),
        (published(weight_block_size=[True, 128]), ".weight_block_size is [True, 128]; expected"),
        (published(weight_block_size=[10**400, 1]), ".weight_block_size is [1000"),
        (published(weight_block_size="128"), ".weight_block_size is '128'; expected"),
        (published(modules_to_not_convert={"a": MANY}), ".modules_to_not_convert is {'a': ["),
        (published(ignored_layers=[*MANY, 5]), ".ignored_layers is ['model.layers.0"),
        (published(kv_cache_scheme=None), "not understood: quantization_config.kv_cache_scheme = null"),
        (published(other=MANY), 'not understood: quantization_config.other = ["model.layers.0'),
    ],
)
def test_other_configurations_are_refused_in_few_words(tmp_path: Path, content: Any, told: str) -> None:
    with_config(tmp_path, content)
    for reader in (read_quantisation, read_architecture):
        with pytest.raises(ModelError) as caught:
            reader(tmp_path)
        assert told in str(caught.value)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 350


# ---- the copy --------------------------------------------------------------------------------------------------


def test_the_copy_stands_for_the_same_weights(quantised: Quantised, tmp_path: Path) -> None:
    directory, meaning = quantised
    done = dequantise(directory, tmp_path / "new" / "out")
    out, stored = tmp_path / "new" / "out", files_of(directory)
    copy = files_of(out)
    converted = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert done == Dequantised(len(converted), len(meaning) - len(converted))
    assert len(converted) == 2 * (4 + 3 * 2)
    assert copy.keys() == meaning.keys()
    for name, tensor in copy.items():
        assert torch.equal(tensor, meaning[name].bfloat16() if name in converted else stored[name]), name
        assert tensor.dtype == (torch.bfloat16 if name in converted else stored[name].dtype)
    assert copy["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    before, after = (json.loads((each / "config.json").read_text()) for each in (directory, out))
    assert before.pop("quantization_config") == published()
    assert after == before
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    check_weights(out, values=True)


def test_transformers_loads_the_copy(quantised: Quantised, tmp_path: Path) -> None:
    directory, meaning = quantised
    dequantise(directory, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.norm.weight"):
        assert torch.equal(loaded[name], meaning[name].bfloat16())


def test_large_copies_are_written_in_several_files(
    quantised: Quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 100_000)
    directory, meaning = quantised
    dequantise(directory, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert files_of(tmp_path / "out").keys() == meaning.keys()


def test_a_graft_of_a_quantised_model_is_in_bf16(quantised: Quantised, tmp_path: Path) -> None:
    directory, meaning = quantised
    dequantise(directory, tmp_path / "whole")
    for donor, base in ((directory, tmp_path / "whole"), (tmp_path / "whole", directory)):
        graft(donor, base, tmp_path / base.name / "out", ["expert"])
        assert all(
            torch.equal(tensor.bfloat16(), meaning[name].bfloat16())
            for name, tensor in files_of(tmp_path / base.name / "out").items()
        )
        assert read_quantisation(tmp_path / base.name / "out") is None


def test_nothing_is_left_behind_by_a_refusal(quantised: Quantised, tmp_path: Path) -> None:
    directory, _ = quantised
    with pytest.raises(FileInTheWayError, match="fp8 exists already; choose another directory"):
        dequantise(directory, directory)
    edit(directory, lambda t: t["model.layers.1.self_attn.o_proj.weight_scale_inv"].fill_(0))
    with pytest.raises(ModelError, match=r"o_proj\.weight_scale_inv holds a scale that is not a finite number above 0"):
        dequantise(directory, tmp_path / "out")
    set_config(directory, quantization_config=None)
    with pytest.raises(ModelError, match=r"config\.json has no quantization_config; there is nothing to convert"):
        dequantise(directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def test_damaged_headers_are_refused_before_anything_is_written(quantised: Quantised, tmp_path: Path) -> None:
    directory, _ = quantised
    edit(directory, lambda t: t.pop("model.norm.weight"))
    with small_disk(tmp_path / "disk", "20k") as disk:
        with pytest.raises(ModelError, match=r"model\.norm\.weight missing"):
            dequantise(directory, disk / "out")
        assert not list(disk.iterdir())


def test_a_full_disk_leaves_nothing_behind(quantised: Quantised, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "20k") as disk:
        with pytest.raises(DiskError, match=r"the model in .*/disk/out was not written: .*no space left on device"):
            dequantise(quantised[0], disk / "out")
        assert not list(disk.iterdir())


def test_the_command_says_what_it_did(quantised: Quantised, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["dequantise", str(quantised[0]), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'out'}: 20 tensors converted to bf16, 13 as they were" in done.output
    check_weights(tmp_path / "out", values=True)


# ---- who asks for a copy ---------------------------------------------------------------------------------------


def test_a_run_with_rollout_servers_asks_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_config(tmp_path / "model", published())
    config = write(tmp_path / "a.yaml", RL)
    told = "model.path: model has weights in fp8, and rollout servers would take the trainer's weights for such too; "
    for overrides in ([], ["rollout.servers.urls=[http://localhost:1]"]):
        with pytest.raises(ConfigError, match=rf"^{re.escape(told)}write .* `megatron-rl dequantise model OUT` "):
            resolve(Config, config, overrides, 1)
    assert resolve(Config, config, ["rollout.replay_from=runs/zero"], 1).arch.num_layers == 8
    assert resolve(SftConfig, write(tmp_path / "b.yaml", SFT), [], 1).arch.num_layers == 8
    write_model(tmp_path / "model")
    with_config(tmp_path / "reference", published())
    kl = ["objective.kl.kind=k3", "objective.kl.beta=0.04", "model.reference=reference"]
    assert resolve(Config, config, kl, 1).arch.num_layers == 8


def test_parity_asks_for_the_copy(quantised: Quantised, tmp_path: Path) -> None:
    tokens = write(tmp_path / "tokens.jsonl", "[1, 2]\n")
    with pytest.raises(ModelError, match=r"in fp8, which transformers computes with on some GPUs only; .* dequantise"):
        run_parity(quantised[0], tokens, ["tp=1"])
