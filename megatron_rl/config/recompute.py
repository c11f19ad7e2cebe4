"""engine.recompute: which activations the backward pass computes again. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.config.layout import Layout
    from megatron_rl.models.architecture import Architecture

MODULES = ("core_attn", "layernorm", "mlp", "moe", "shared_experts", "moe_act", "mla_up_proj")
"""Megatron-Core's recompute_modules, under its names."""
OF_TRANSFORMER_ENGINE = ("moe_act", "mla_up_proj")
"""Modules that only Transformer Engine's layers compute again; the layers in plain PyTorch would ignore them."""
EXPECTED = f"none, full, full:N (the first N layers of each stage), or modules joined by commas: {', '.join(MODULES)}"


@dataclass(frozen=True)
class Recomputation:
    """A value of engine.recompute, read. At most one field is not its default."""

    layers: int | None = 0
    """Layers that run again as a whole, the first of each (virtual) stage; None: all layers."""
    modules: tuple[str, ...] = ()
    """Modules of every layer that run again, in the order of MODULES."""

    @property
    def is_whole(self) -> bool:
        """Whether whole layers run again."""
        return self.layers != 0

    def reruns_router(self, position: int) -> bool:
        """Returns whether the router of a stage's layer `position`, from 0, runs again in the backward pass."""
        return "moe" in self.modules or self.layers is None or position < self.layers

    def rerun_routers(self, layout: Layout, arch: Architecture) -> list[int]:
        """Returns the layers of the whole model, from 0, whose routers run again."""
        stages = layout.split(arch.num_layers)
        return [
            layer
            for stage in stages
            for position, layer in enumerate(stage)
            if arch.is_moe(layer) and self.reruns_router(position)
        ]


def read_recompute(text: str) -> Recomputation:
    """Raises ValueError, with what is expected, if `text` is no value of engine.recompute."""
    if text in ("none", "full"):
        return Recomputation(layers=None if text == "full" else 0)
    if whole := re.fullmatch(r"full:([1-9]\d{0,5})", text):
        return Recomputation(layers=int(whole[1]))
    names = text.split(",")
    if len(set(names)) < len(names) or not set(names) <= set(MODULES):
        raise ValueError(EXPECTED)
    return Recomputation(modules=tuple(name for name in MODULES if name in names))


def check_recompute(recomputation: Recomputation, layers: str, device: str, arch: Architecture) -> Iterator[str]:
    """Yields one line for each module that would do nothing, or nothing more, in the model.

    `layers` and `device` are engine.layers and engine.device.
    """
    has = {
        "mlp": (bool(arch.dense_layers) or not arch.num_experts, "dense MLPs"),
        "moe": (bool(arch.num_experts), "experts"),
        "shared_experts": (bool(arch.shared_hidden_size), "shared experts"),
        "moe_act": (bool(arch.num_experts), "experts"),
        "mla_up_proj": (arch.latent is not None, "latent attention"),
    }
    for module in recomputation.modules:
        present, what = has.get(module, (True, ""))
        if not present:
            yield f"engine.recompute: {module}, but the model has no {what}; drop it"
        elif module in OF_TRANSFORMER_ENGINE and (layers == "torch" or device == "cpu"):
            why = "engine.layers is torch" if layers == "torch" else "engine.device is cpu"
            yield f"engine.recompute: {module} needs Transformer Engine's layers, but {why}; drop it"
        elif "moe" in recomputation.modules and module in ("shared_experts", "moe_act"):
            yield f"engine.recompute: {module} is a part of moe, which is there too; drop one of them"
