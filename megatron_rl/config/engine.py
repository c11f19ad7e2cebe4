"""What the engine's keys say together, with the layout and with the model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_rl.config.fp8_products import check_fp8
from megatron_rl.config.recompute import check_recompute
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_rl.config.layout import Layout


def check_engine(layout: Layout, arch: Architecture, engine: EngineConfig) -> Iterator[str]:
    """Yields one line for each contradiction."""
    if engine.device == "cpu" and engine.layers == "te":
        yield "engine.layers: te needs a GPU, but engine.device is cpu; use auto or torch"
    if engine.layers == "te" and engine.dtype == "fp32":
        yield (
            "engine.layers: te needs engine.dtype bf16, but that is fp32, which Transformer Engine multiplies in TF32; "
            "use auto or torch"
        )
    if engine.dispatcher == "deepep":
        if engine.device == "cpu":
            yield "engine.dispatcher: deepep needs a GPU, but engine.device is cpu; use alltoall"
        if layout.ep * layout.etp == 1:
            yield "engine.dispatcher: deepep needs parallel.ep or parallel.etp above 1; use alltoall"
    if engine.aux_loss_coefficient and not arch.num_experts:
        yield f"engine.aux_loss_coefficient: {engine.aux_loss_coefficient} on a model without experts; set it to 0"
    if engine.grad_dtype == "bf16" and engine.dtype == "fp32":
        yield "engine.grad_dtype: bf16 needs engine.dtype bf16, but that is fp32; set grad_dtype to fp32"
    yield from check_fp8(layout, arch, engine)
    if engine.cp_comm == "a2a":
        yield from _check_head_exchange(layout, arch, engine)
    yield from check_recompute(engine.recomputation, engine.layers, engine.device, arch)


def _check_head_exchange(layout: Layout, arch: Architecture, engine: EngineConfig) -> Iterator[str]:
    if engine.layers == "torch" or engine.device == "cpu":
        why = "engine.layers is torch" if engine.layers == "torch" else "engine.device is cpu"
        yield f"engine.cp_comm: a2a needs Transformer Engine's layers, but {why}; use p2p"
    if layout.cp == 1:
        yield "engine.cp_comm: a2a, but parallel.cp is 1: there is nothing to exchange; use p2p"
    heads = min(arch.num_heads, arch.num_kv_heads) // layout.tp
    if heads % layout.cp or not heads:
        yield (
            f"engine.cp_comm: a2a gives each of parallel.cp {layout.cp} ranks some of the {heads} key-value heads of a "
            "tensor-parallel rank; use p2p, or a cp that divides them"
        )
