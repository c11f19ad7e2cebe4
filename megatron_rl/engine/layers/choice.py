"""The choice of a layer provider, from the configuration and from what is installed."""

from __future__ import annotations

import importlib.util

import torch

from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.layers.plain_torch import TorchLayers
from megatron_rl.engine.layers.provider import LayerProvider
from megatron_rl.engine.layers.transformer_engine import TransformerEngineLayers


def choose_layers(engine: EngineConfig) -> LayerProvider:
    """Raises RuntimeError when Transformer Engine is asked for and cannot be imported."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if engine.layers == "te" and not installed:
        raise RuntimeError(
            "engine.layers is te, but transformer_engine is not installed; install the extra [te], or use auto"
        )
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    if engine.layers == "te" or (engine.layers == "auto" and installed and on_gpu):
        return TransformerEngineLayers()
    return TorchLayers()
