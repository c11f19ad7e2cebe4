"""The device that a rank computes on. Imports no Megatron-Core, so a wrong choice is found before that is imported."""

from __future__ import annotations

import os

import torch

from megatron_rl.config.schema import EngineConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.ranks.world import read_world


def resolve_device(requested: str) -> torch.device:
    """Returns this rank's device; `requested` is auto, cpu or cuda. Raises ConfigError if there is no GPU for it."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda, but torch sees no CUDA device; use auto or cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = read_world().local_rank, torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"engine.device: {requested}, but LOCAL_RANK is {local_rank} and torch sees {gpus} GPUs; start one rank "
            "for each GPU of a node"
        )
    return torch.device("cuda", local_rank)


def check_deterministic(engine: EngineConfig) -> None:
    """Raises ConfigError if engine.deterministic lacks an environment variable that the kernels of a GPU need."""
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    if engine.deterministic and on_gpu and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise ConfigError(
            "engine.deterministic: true, but the environment variable CUBLAS_WORKSPACE_CONFIG is not :4096:8, without "
            "which cuBLAS may give other bits; set it for all ranks"
        )
