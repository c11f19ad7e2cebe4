"""Configuration files for the tests of config/ and the command line. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rl.models.architecture import Architecture

MODEL_FIELDS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 99,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    num_layers=8,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=99,
    ffn_hidden_size=96,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    qk_norm="head",
    tied_embeddings=False,
    initializer_range=0.02,
    num_experts=16,
    experts_per_token=2,
    expert_hidden_size=48,
)

RL = """\
run_dir: runs/one
model: {path: model}
data: {train: prompts.jsonl}
train: {steps: 3}
"""
SFT = """\
run_dir: runs/one
model: {path: model}
data: {train: examples.jsonl}
steps: 3
"""
# Layouts that combine several kinds of parallelism.
LAYOUTS = (
    "tp=2,cp=2,pp=2,dp=2,ep=4,etp=2",
    "tp=4,ep=2,dp=2",
    "pp=4,ep=2,dp=4",
    "cp=2,etp=2,ep=2",
    "pp=2,vpp=2",
    "pp=2,vpp=4,tp=2",
    "pp=4,vpp=2",
    "pp=3",
    "pp=3,vpp=2,tp=2",
    "pp=5",
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_model(directory: Path, fields: dict[str, Any] | None = None) -> Path:
    """Writes a model directory, of ARCHITECTURE by default, without weights: all that a dry run reads."""
    write(directory / "config.json", json.dumps(fields or MODEL_FIELDS))
    return directory
