"""Tiny random models of every family, made by transformers from the config.json in tests/families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from tiny_models import fill, make_tokenizer

CONFIGS = ROOT / "tests" / "families"
FAMILIES = sorted(file.stem for file in CONFIGS.glob("*.json"))


def make_family_model(path: Path, family: str, *, std: float = 0.15, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json, safetensors and the tokenizer into `path`, and returns it; `changes` are fields of config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    content = json.loads((CONFIGS / f"{family}.json").read_text())
    content.get("text_config", content).update(changes)
    kind = AutoModelForImageTextToText if "vision_config" in content else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(content.pop("model_type"), **content), dtype=torch.float32)
    fill(model, std, torch.Generator().manual_seed(seed))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
