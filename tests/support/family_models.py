"""Tiny random models of every family, made by transformers from the config.json in tests/families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from tiny_models import make_tokenizer

CONFIGS = ROOT / "tests" / "families"
FAMILIES = sorted(file.stem for file in CONFIGS.glob("*.json"))


def make_family_model(path: Path, family: str, *, std: float = 0.15, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json, safetensors and the tokenizer into `path`, and returns it; `changes` are fields of config.

    Matrices are normal with `std`. What has one dimension, such as norms and biases, is 0.5 + U(0, 1); a router's bias,
    which chooses experts, is U(0, 0.2).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    content = {**json.loads((CONFIGS / f"{family}.json").read_text()), **changes}
    model_type = content.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **content), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.rand(buffer.shape, generator=generator))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
