"""What the engine's keys say together, with the layout and with the model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_rl.config.recompute import check_recompute
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_rl.config.layout import Layout


def check_engine(layout: Layout, arch: Architecture, engine: EngineConfig) -> Iterator[str]:
    """Yields one line for each contradiction."""
    if engine.device == "cpu" and engine.layers == "te":
        yield "engine.layers: te needs a GPU, but engine.device is cpu; use auto or torch"
    if engine.dispatcher == "deepep":
        if engine.device == "cpu":
            yield "engine.dispatcher: deepep needs a GPU, but engine.device is cpu; use alltoall"
        if layout.ep * layout.etp == 1:
            yield "engine.dispatcher: deepep needs parallel.ep or parallel.etp above 1; use alltoall"
    if engine.aux_loss_coefficient and not arch.num_experts:
        yield f"engine.aux_loss_coefficient: {engine.aux_loss_coefficient} on a model without experts; set it to 0"
    if engine.grad_dtype == "bf16" and engine.dtype == "fp32":
        yield "engine.grad_dtype: bf16 needs engine.dtype bf16, but that is fp32; set grad_dtype to fp32"
    yield from check_recompute(engine.recomputation, engine.layers, engine.device, arch)
