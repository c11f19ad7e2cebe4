"""Weights that do not train: they have no gradient, no gradient buffer and no optimizer state."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.models.kinds import WeightKind


def freeze(
    stages: Sequence[GPTModel], kinds: Mapping[torch.nn.Parameter, WeightKind], frozen: Collection[WeightKind]
) -> None:
    """Freezes the parameters of the `frozen` kinds; `kinds` are those of the stages' parameters.

    Call it before DDP and the optimizer are built: Megatron-Core gives both only to parameters that require a gradient.
    """
    for parameter, kind in kinds.items():
        if kind in frozen:
            parameter.requires_grad_(False)
    if "embedding" not in frozen:
        return
    for stage in stages:
        # What is recomputed gives its weights gradients only if its input requires one (CheckpointFunction). The first
        # layer's input is the embedding's output, which requires none if the embedding is frozen.
        if stage.pre_process and stage.config.recompute_granularity is not None:
            stage.embedding.register_forward_hook(_require_grad)


def digest_frozen(stages: Sequence[torch.nn.Module]) -> str:
    """Returns a digest of this rank's frozen weights; empty if it has none.

    It reads them all: a model's large files are only sampled (models/identity.py), and no stretch of the sample need be
    in a router.
    """
    sha = hashlib.sha256()
    frozen = [p for stage in stages for p in stage.parameters() if not p.requires_grad]
    for parameter in frozen:
        sha.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest() if frozen else ""


def _require_grad(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
