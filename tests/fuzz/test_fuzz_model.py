"""Randomly damaged model directories: each gives one ModelError, or the values of safetensors' own reader."""

from __future__ import annotations

import collections
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import drawing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models_reference import hf_shapes
from quantised_models import quantise_model, values_of
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.fields import ModelError
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Source

Draw = Callable[[st.SearchStrategy[Any]], Any]
INDEX = "model.safetensors.index.json"
FIELDS = {  # name in config.json: name in Architecture
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "moe_intermediate_size": "expert_hidden_size",
    "num_experts_per_tok": "experts_per_token",
    "tie_word_embeddings": "tied_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
VALUES: list[Any] = [
    *[None, True, False, 0, 1, 2, -1, 16, 2**31, 10**18, 10**400, 0.0, 0.5, -1.5, 1e300, float("nan"), float("inf")],
    *["", "x", "silu", "../x.safetensors", "/etc/passwd", "model.safetensors", "a\0b", "\ud800", "x" * 5000],
    *[[], [0], [1, 2], [[]], ["full_attention"], {}, {"a": 1}, {"rope_type": "default"}, {"rope_theta": 1e4}],
    *["F64", "I8", "BF16", "F16", "F8_E4M3", [0, 4], [4, 0], [0, 10**18], [-1, 4], [2, 2, 2]],
]
BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[" * 5000,
    b'{"a":' * 5000,
    b'"',
    b",",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"\x7f",
]
NOT_FINITE = [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\xff\xff"]


@pytest.fixture(scope="module", params=["plain", "fp8"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged directory with two files of weights and an index."""
    directory = tmp_path_factory.mktemp("models") / "whole"
    make_tiny_model(
        directory, num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=2,
        expert_hidden_size=8, ffn_hidden_size=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="8KB")
    assert len(list(directory.glob("*.safetensors"))) == 2
    if request.param == "fp8":
        quantise_model(directory, (5, 7))
    return directory


def stored(directory: Path, listed: dict[str, str], name: str, config: dict[str, Any]) -> torch.Tensor:
    """Returns a weight as safetensors' own reader has it; in fp8, what it stands for."""
    tensor = load_file(directory / listed[name])[name]
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = f"{name}_scale_inv"
    size = config["quantization_config"]["weight_block_size"]
    return values_of(tensor, load_file(directory / listed[scale])[scale], size)


def _set_somewhere(draw: Draw, tree: Any) -> Any:
    """Replaces, removes or duplicates a value of the tree at any depth."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        tree = dict(tree)
        key = draw(st.sampled_from(sorted(tree)))
        match draw(st.integers(0, 4)):
            case 0:
                del tree[key]
            case 1:
                tree[draw(st.sampled_from([*sorted(tree), "more", "a.b"]))] = tree[key]
            case _:
                tree[key] = _set_somewhere(draw, tree[key])
        return tree
    if isinstance(tree, list) and tree and draw(st.booleans()):
        position = draw(st.integers(0, len(tree) - 1))
        return [*tree[:position], _set_somewhere(draw, tree[position]), *tree[position + 1 :]]
    return draw(st.sampled_from(VALUES))


def _cut(draw: Draw, data: bytes, pieces: list[bytes]) -> bytes:
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 4, 64, len(data)])))
    return data[:start] + draw(st.sampled_from(pieces)) + data[end:]


def _header(draw: Draw, data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = _set_somewhere(draw, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _value(draw: Draw, data: bytes) -> bytes:
    """Overwrites one value, perhaps with a non-finite one."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    if start + 4 > len(data):
        return data[:-1]
    at = start + 4 * draw(st.integers(0, (len(data) - start) // 4 - 1))
    return data[:at] + draw(st.one_of(st.sampled_from(NOT_FINITE), st.binary(min_size=4, max_size=4))) + data[at + 4 :]


def damaged(draw: Draw, files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns some of the files, damaged."""
    changed: dict[str, bytes] = {}
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(files)))
        data = changed.get(name, files[name])
        how = draw(st.integers(0, 3))
        try:
            if how == 0:
                data = _cut(draw, data, BYTES)
            elif name.endswith(".json"):
                data = json.dumps(_set_somewhere(draw, json.loads(data))).encode("utf-8", "surrogatepass")
            else:
                data = _header(draw, data) if how == 1 else _value(draw, data)
        except (
            ValueError,
            RecursionError,
            struct.error,
            MemoryError,
        ):  # an earlier change has already damaged it too much
            data = _cut(draw, data, BYTES)
        changed[name] = data
    return changed


def check(directory: Path) -> str:
    message = ""
    try:
        arch = read_architecture(directory)
        check_weights(directory, values=True)
    except ModelError as error:
        message = str(error)
    if message:
        assert str(directory) in message
        assert len(message) < 3000
        return "refused"
    config = json.loads((directory / "config.json").read_text())
    given = {name: value for name, value in config.items() if name in FIELDS and (name, value) != ("head_dim", None)}
    assert given == {name: getattr(arch, FIELDS[name]) for name in given}
    assert config["norm_topk_prob"] is not arch.router.pre_softmax
    listed = json.loads((directory / INDEX).read_text())["weight_map"]
    files = TensorFiles(directory)
    assert set(listed) >= set(hf_shapes(arch))
    for name, shape in hf_shapes(arch).items():
        expected = stored(directory, listed, name, config)
        found = files.read(Source(name, tuple(shape)), 0, 0, shape[0])
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert torch.isfinite(found).all()
    return "accepted"


def run(whole: Path, directory: Path, examples: int) -> collections.Counter[str]:
    shutil.copytree(whole, directory)
    names = ["config.json", INDEX, *(path.name for path in sorted(whole.glob("*.safetensors")))]
    files = {name: (whole / name).read_bytes() for name in names}
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(drawing(examples), phases=(Phase.generate,))
    @given(st.data())
    def each(data: st.DataObject) -> None:
        changed = damaged(data.draw, files)
        for name, content in changed.items():
            (directory / name).unlink()  # creates a new file: the old one may still be mapped
            (directory / name).write_bytes(content)
        try:
            outcomes[check(directory)] += 1
        finally:
            for name in changed:
                (directory / name).unlink()
                (directory / name).write_bytes(files[name])

    assert check(directory) == "accepted"
    each()
    return outcomes


def test_damaged_model_directories_are_refused_or_read_correctly(whole: Path, tmp_path: Path) -> None:
    outcomes = run(whole, tmp_path / "model", 200)
    assert outcomes["refused"] > 50
    assert outcomes["accepted"] > 10


@pytest.mark.slow
def test_many_damaged_model_directories_are_refused_or_read_correctly(whole: Path, tmp_path: Path) -> None:
    outcomes = run(whole, tmp_path / "model", 10_000)
    print(dict(outcomes))
    assert sum(outcomes.values()) >= 9_000
    assert outcomes["accepted"] > 500
