"""The demo's model directory, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_rl.data.arithmetic_task import ALPHABET, prompt_text, response_text
from megatron_rl.demo.demo_model import make_demo_model
from megatron_rl.models.architecture import read_architecture

SMALL: dict[str, Any] = {"layers": 1, "hidden": 16, "experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    make_demo_model(path)
    return path


def test_the_tokenizer_has_one_token_per_character(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = prompt_text([3, 5, 2]) + response_text([3, 5, 2])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 2 + len(ALPHABET))
    assert tokenizer.decode([1]) == "<eos>"
    assert tokenizer.encode("3 a") == [ids[0], tokenizer.unk_token_id, tokenizer.unk_token_id]


def test_the_demo_model_has_the_documented_shape(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert 2.6e6 < model.num_parameters() < 2.8e6
    arch = read_architecture(directory)
    assert (arch.num_layers, arch.hidden_size, arch.head_dim, arch.num_heads, arch.num_kv_heads) == (6, 128, 32, 4, 2)
    assert (arch.num_experts, arch.experts_per_token, arch.vocab_size) == (16, 4, 2 + len(ALPHABET))
    assert arch.max_position_embeddings == 512
    assert not arch.tied_embeddings
    assert model.config.eos_token_id == GenerationConfig.from_pretrained(directory).eos_token_id == 1
    logits = model(torch.tensor([[2, 3, 4]])).logits
    assert logits.shape == (1, 3, 2 + len(ALPHABET))
    assert torch.isfinite(logits).all()


def test_weights_depend_only_on_the_seed(tmp_path):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo_model(tmp_path / name, seed=seed, **SMALL)
    assert torch.equal(state, torch.random.get_rng_state())
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_an_existing_directory_is_left_unchanged(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        make_demo_model(tmp_path / "model", **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "mine"]


def test_no_row_of_the_embedding_is_zero(tmp_path: Path) -> None:
    """The first norm would multiply the gradient of a zero row by about a thousand."""
    make_demo_model(tmp_path / "model")
    (row_norms,) = [
        weight.norm(dim=1)
        for name, weight in load_file(tmp_path / "model" / "model.safetensors").items()
        if name == "model.embed_tokens.weight"
    ]
    assert row_norms.min() > 0.1
