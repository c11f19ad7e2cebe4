"""Reading Hugging Face directories into stages, and writing them from stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from model_directories import K_PROJ, edit, empty_stage, files_of, make, make_sharded, whole
from models_reference import chunk_parameters, hf_shapes, weight_names
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.models import weights_io
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import ModelRanks
from megatron_rl.models.fields import ModelError
from megatron_rl.models.registry import tensors_of
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Source
from megatron_rl.models.weights_io import load_weights, save_weights

TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(params=["qwen3_moe", "qwen3"])
def model(request, tmp_path) -> tuple[Path, Architecture]:
    return make(tmp_path / "hf", request.param)


@pytest.fixture
def tied(tmp_path) -> tuple[Path, Architecture]:
    return make(tmp_path / "hf", "qwen3")


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_saved_by_transformers_are_loaded(tmp_path, sharded):
    directory, arch = make_sharded(tmp_path / "hf") if sharded else make(tmp_path / "hf", "qwen3_moe")
    stage = empty_stage(arch)
    assert load_weights([stage], arch, directory, ModelRanks(), weight_names()) == ()
    expected = chunk_parameters(files_of(directory), arch, range(arch.num_layers))
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_rank_reads_only_its_share(moe, monkeypatch):
    directory, arch = moe
    elements = 0
    read = TensorFiles.read

    def counted(self, *where):
        nonlocal elements
        tensor = read(self, *where)
        elements += tensor.numel()
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counted)
    shares: dict[str, Any] = {"tp": (1, 2), "ep": (1, 2), "etp": (0, 2)}
    ranks = ModelRanks(tp_rank=1, tp_size=2, ep_rank=1, ep_size=2, etp_rank=0, etp_size=2)
    stages = [empty_stage(arch, [layer], **shares) for layer in (0, 3)]  # two virtual stages
    load_weights(stages, arch, directory, ranks, weight_names())
    tensors = files_of(directory)
    for stage, layers in zip(stages, ([0], [3]), strict=True):
        for name, tensor in chunk_parameters(tensors, arch, layers, **shares).items():
            assert torch.equal(stage.get_parameter(name), tensor), name
    held = sum(p.numel() for stage in stages for p in stage.parameters())
    padding = 2 * arch.hidden_size  # one row each of embedding and output layer
    assert elements == held - padding


def test_values_are_cast_to_the_parameters_dtype(moe):
    directory, arch = moe
    edit(directory, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    stage = empty_stage(arch)
    load_weights([stage], arch, directory, ModelRanks(), weight_names())
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    half = empty_stage(arch, dtype=torch.bfloat16)
    load_weights([half], arch, directory, ModelRanks(), weight_names())
    for name, parameter in half.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.float(), stage.get_parameter(name)), name


def test_the_last_stage_of_a_tied_model_gets_the_embedding(tied):
    directory, arch = tied
    last = empty_stage(arch, [3], tp=(1, 2))
    load_weights([last], arch, directory, ModelRanks(tp_rank=1, tp_size=2), weight_names())
    embedding = files_of(directory)["model.embed_tokens.weight"]
    output = last.get_parameter("output_layer.weight")
    assert torch.equal(output[:18], embedding[19:])
    assert torch.equal(output[18], torch.zeros(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_PROJ), rf"{K_PROJ} missing; config.json asks for it"),
        (lambda t: t.update({K_PROJ: torch.zeros(8, 16)}), rf"{K_PROJ} has shape \(8, 16\); .* \(16, 16\)"),
        (
            lambda t: t.update({K_PROJ: torch.zeros(16, 16, dtype=torch.int8)}),
            rf"{K_PROJ} has dtype I8; expected",
        ),
        (
            lambda t: t.update({K_PROJ: torch.zeros(16, 16).to(torch.float8_e4m3fn)}),
            rf"{K_PROJ} has dtype F8_E4M3",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.bias": torch.zeros(16)}),
            r"model\.layers\.1\.self_attn\.k_proj\.bias has no place in the qwen3_moe model",
        ),
        (
            lambda t: t.update({f"model.layers.3.{n}.weight": torch.zeros(16) for n in "abcde"}),
            r"layers\.3\.a\.weight, .* and 2 more has no place",
        ),
    ],
)
def test_the_error_names_tensors_that_do_not_fit(moe, change, message):
    directory, arch = moe
    edit(directory, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())
    assert "model.safetensors" in str(caught.value)


def test_known_unused_tensors_are_returned(moe):
    directory, arch = moe
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(directory, lambda t: t.update({extra: torch.zeros(4)}))
    assert load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names()) == (extra,)


def test_layers_that_predict_several_tokens_are_passed_over(moe):
    directory, arch = moe
    extra = f"model.layers.{arch.num_layers}.self_attn.q_proj.weight"
    edit(directory, lambda t: t.update({extra: torch.zeros(4, 4)}))
    predicting = dataclasses.replace(arch, predictor_layers=1)
    assert load_weights([empty_stage(arch)], predicting, directory, ModelRanks(), weight_names()) == (extra,)
    with pytest.raises(ValueError, match=f"{extra} has no place"):
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())


def test_a_stray_output_layer_must_be_the_tied_embedding(tied):
    directory, arch = tied
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names()) == ("lm_head.weight",)
    edit(directory, lambda t: t["lm_head.weight"][36].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())


def test_a_stray_output_layer_is_not_saved(tied, tmp_path):
    """It would be that of the weights before the training."""
    directory, arch = tied
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tensors = [(source.name, torch.zeros(source.shape)) for (source,) in tensors_of(arch)]
    save_weights(tensors, tmp_path / "saved", directory, 10**9, torch.float32)
    assert files_of(tmp_path / "saved").keys() == dict(tensors).keys()


def test_broken_model_directories_are_refused(tmp_path):
    directory, arch = make_sharded(tmp_path / "hf")

    def load() -> None:
        load_weights([empty_stage(arch)], arch, directory, ModelRanks(), weight_names())

    single = directory / "model.safetensors"
    single.write_bytes(b"of an earlier save")
    with pytest.raises(ValueError, match=r"holds both .* and model\.safetensors; .* remove one"):
        load()
    single.unlink()
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_, last = sorted(set(content["weight_map"].values()))
    name = next(n for n, file in content["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: last}}))
    with pytest.raises(ValueError, match=f"{last}: tensor {name} is missing; model.safetensors.index.json puts it"):
        load()
    index.write_text(json.dumps(content))
    whole_file = (directory / first).read_bytes()
    (directory / first).write_bytes(whole_file[:-8])
    with pytest.raises(ValueError, match=f"{first} is not a whole safetensors file"):
        load()
    header = (
        b'{"x":{"dtype":"F32","data_offsets":[0,4],"shape":"' + b"x" * 5000 + b'"}}'
    )  # the library quotes the whole header
    (directory / first).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=f"{first} is not a whole safetensors file") as error:
        load()
    assert len(str(error.value)) < 500
    (directory / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"lists {first}, which does not exist"):
        load()
    index.write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object; found a list"):
        load()
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither .* nor .*; expected one"):
        load()


def test_tensor_files_lists_shapes_and_dtypes_and_reads_column_ranges(moe):
    directory, arch = moe
    files = TensorFiles(directory)
    assert {name: files.shape(name) for name in files.names} == dict(sorted(hf_shapes(arch).items()))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert files.dtype(name) == "F32"
    tensor = files_of(directory)[name]
    assert torch.equal(files.read(Source(name, (16, 32)), 1, 5, 3), tensor[:, 5:8])
    with pytest.raises(ValueError, match="tensor nobody is missing"):
        files.shape("nobody")


# ---- saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_transformers_computes_the_same_with_a_saved_directory(model, tmp_path, max_shard_bytes):
    directory, arch = model
    stage = empty_stage(arch)
    load_weights([stage], arch, directory, ModelRanks(), weight_names())
    saved = tmp_path / "steps" / "saved"
    save_weights(whole(stage, arch), saved, directory, max_shard_bytes, torch.float32)

    before, after = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (directory, saved))
    with torch.no_grad():
        assert torch.equal(before(TOKENS).logits, after(TOKENS).logits)
    names = {file.name for file in saved.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} < names
    assert "README.md" not in names
    assert (saved / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]
    # A server that runs as another user must be able to read it.
    assert all(file.stat().st_mode & stat.S_IRGRP for file in saved.iterdir())


def test_shards_have_a_size_limit_and_are_listed_in_the_index(moe, tmp_path):
    directory, _ = moe
    saved = tmp_path / "saved"
    save_weights(files_of(directory).items(), saved, directory, 3000, torch.float32)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = sorted(saved.glob("model-*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert len(shards) > 10
    sizes = []
    for shard in shards:
        tensors = load_file(shard)
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(tensors)
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= 3000 or len(tensors) == 1
    assert all(a + b > 3000 for a, b in itertools.pairwise(sizes))  # no shard starts while the previous one has room
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in files_of(directory).values())


def test_saving_in_another_dtype_changes_only_dtype_in_the_config(moe, tmp_path):
    directory, _ = moe
    saved = tmp_path / "saved"
    save_weights(files_of(directory).items(), saved, directory, 10**9, torch.bfloat16)
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, saved))
    assert after == {**before, "dtype": "bfloat16"}
    assert {t.dtype for t in files_of(saved).values()} == {torch.bfloat16}


def test_only_one_shard_is_held_in_memory(moe, tmp_path, monkeypatch):
    """The writer reads the next tensor only if there is room for it, and frees written ones."""
    directory, _ = moe
    held: list[int] = []
    save = weights_io.save_file

    def measured(tensors, *args, **kwargs):
        held.append(sum(t.nbytes for t in tensors.values()))
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(weights_io, "save_file", measured)
    tensors = files_of(directory)
    biggest = max(t.nbytes for t in tensors.values())
    given = 0

    def stream():
        nonlocal given
        for name, tensor in tensors.items():
            given += tensor.nbytes
            assert given - sum(held) <= 3000 + biggest
            yield name, tensor

    save_weights(stream(), tmp_path / "saved", directory, 3000, torch.float32)
    assert sum(held) == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[:-1], "never given to be saved: model.norm.weight"),
        (lambda pairs: [*pairs, pairs[3]], "is no tensor of this qwen3_moe model, or came before"),
        (lambda pairs: [*pairs, ("model.extra", torch.zeros(1))], "model.extra was to be saved"),
        (
            lambda pairs: [(pairs[0][0], pairs[0][1][1:]), *pairs[1:]],
            r"with shape \(36, 16\); expected \(37, 16\)",
        ),
    ],
)
def test_an_incomplete_stream_leaves_nothing_behind(moe, tmp_path, change, message):
    directory, _ = moe
    with pytest.raises(ValueError, match=message):
        save_weights(change(list(files_of(directory).items())), tmp_path / "saved", directory, 3000, torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_failed_stream_leaves_nothing_behind_and_removes_old_leftovers(moe, tmp_path):
    directory, _ = moe
    leftover = tmp_path / ".saved.partial"
    leftover.mkdir()
    (leftover / "7.safetensors").write_bytes(b"of a killed run")

    def failing():
        yield from list(files_of(directory).items())[:9]
        raise RuntimeError("rank 3 is gone")

    with pytest.raises(RuntimeError, match="rank 3 is gone"):
        save_weights(failing(), tmp_path / "saved", directory, 3000, torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]

    leftover.mkdir()
    (leftover / "7.safetensors").write_bytes(b"of a killed run")
    save_weights(files_of(directory).items(), tmp_path / "saved", directory, 10**9, torch.float32)
    assert "7.safetensors" not in {p.name for p in (tmp_path / "saved").iterdir()}


def test_an_existing_directory_is_not_changed(moe, tmp_path):
    directory, _ = moe
    target = tmp_path / "saved"
    shutil.copytree(directory, target)
    with pytest.raises(FileExistsError, match="saved exists already"):
        save_weights(iter(()), target, directory, 3000, torch.float32)
    assert files_of(target).keys() == files_of(directory).keys()
