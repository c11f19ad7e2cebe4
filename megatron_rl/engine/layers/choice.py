"""The choice of a layer provider, from the configuration, the model and what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from megatron_rl.config.plain_layers import plain_features
from megatron_rl.config.recompute import OF_TRANSFORMER_ENGINE
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.layers.plain_torch import TorchLayers
from megatron_rl.engine.layers.provider import LayerProvider
from megatron_rl.engine.layers.transformer_engine import TransformerEngineLayers
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture


def choose_layers(engine: EngineConfig, arch: Architecture) -> LayerProvider:
    """Raises RuntimeError if Transformer Engine is asked for and cannot be imported. Raises UserError if it would be
    used for a model with features that have not been run with it, or is not used and another setting needs it."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if engine.layers == "te" and not installed:
        raise RuntimeError(
            "engine.layers is te, but transformer_engine is not installed; install the extra [te], or use auto"
        )
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    # Transformer Engine multiplies fp32 in TF32, and has no attention in fp32 under context parallelism.
    takes_it = installed and on_gpu and engine.dtype == "bf16"
    if engine.layers == "te" or (engine.layers == "auto" and takes_it):
        if features := plain_features(arch):
            raise UserError(
                f"engine.layers is {engine.layers}, and the model has {', '.join(features)}, which have not been run "
                "with Transformer Engine's layers; set engine.layers to torch"
            )
        return TransformerEngineLayers()
    for setting, fix in _needing_transformer_engine(engine):
        raise UserError(
            f"{setting} needs Transformer Engine's layers, and engine.layers {engine.layers} gives those in plain "
            f"PyTorch here; {fix}"
        )
    return TorchLayers()


def _needing_transformer_engine(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    """Yields settings that the layers in plain PyTorch would ignore, and what to do."""
    if engine.cp_comm == "a2a":
        yield "engine.cp_comm: a2a", "use p2p"
    if engine.fp8 != "none":
        yield f"engine.fp8: {engine.fp8}", "set it to none"
    if ignored := [each for each in engine.recomputation.modules if each in OF_TRANSFORMER_ENGINE]:
        yield f"engine.recompute: {', '.join(ignored)}", "drop it"
