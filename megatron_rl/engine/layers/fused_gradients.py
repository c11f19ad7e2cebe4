"""Weight gradients that a matrix product adds to DDP's gradient buffer itself. Otherwise each is a tensor of its own,
in the model's dtype, and is added by a second kernel.

Whatever can do it does. Megatron-Core's linear layers need apex's kernel, as in Megatron-LM; Transformer Engine's have
kernels of their own. Weights that do not train are left out. DDP's hooks are called all the same, with a gradient that
says nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch


def has_apex_kernel(device: torch.device) -> bool:
    """Whether Megatron-Core's `gradient_accumulation_fusion` can be set."""
    return device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fuse_gradients(stages: Iterable[torch.nn.Module]) -> None:
    """Sets it in Transformer Engine's layers. Megatron-Core would do so only with apex, which its output layer needs;
    here that layer is never called (heads.py)."""
    for stage in stages:
        for module in stage.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
