"""Small models with the config.json of a published one, but for its widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from safetensors.torch import save_file
from tiny_models import VOCAB_SIZE, make_tokenizer

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.registry import tensors_of

PUBLISHED = ROOT / "tests" / "families" / "published"
LAYERS = 4
SMALL = {
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_hidden_layers": LAYERS,
    "num_local_experts": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "shared_expert_intermediate_size": 80,
    "v_head_dim": 12,
    "vocab_size": VOCAB_SIZE,
}


def make_published_model(directory: Path, name: str) -> Path:
    """Writes config.json, random weights and the tokenizer into `directory`, and returns it."""
    content = json.loads((PUBLISHED / f"{name}.json").read_text())
    content.pop("quantization_config", None)
    _shrink(content.get("text_config", content))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for source, *_ in tensors_of(read_architecture(directory)):
        weight = torch.randn(source.whole.shape, generator=generator)
        tensors[source.name] = 1 + 0.1 * weight if weight.dim() == 1 else 0.1 * weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(directory)
    return directory


def _shrink(content: dict[str, Any]) -> None:
    """A field stays absent, null, or 0 if it is."""
    shares_heads = content["num_key_value_heads"] < content["num_attention_heads"]
    content |= {field: value for field, value in SMALL.items() if content.get(field)}
    content["num_key_value_heads"] = 2 if shares_heads else 4
    if "layer_types" in content:
        content["layer_types"] = content["layer_types"][:LAYERS]
