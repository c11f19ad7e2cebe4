"""Megatron-Core's DDP around this rank's stages: how gradients are reduced and weights gathered over replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.layers.fused_gradients import fuse_gradients


def ddp_config(engine: EngineConfig, layout: Layout, *, trains: bool) -> DistributedDataParallelConfig:
    """Without `trains` there is no optimizer: gradients are reduced whole and after the backward pass."""
    gathers = trains and engine.overlap == "all"
    return DistributedDataParallelConfig(
        use_distributed_optimizer=trains,
        grad_reduce_in_fp32=engine.grad_dtype == "fp32",
        overlap_grad_reduce=trains and engine.overlap != "none",
        overlap_param_gather=gathers,
        # The interleaved schedule alone starts the gathers of all pipeline ranks together (schedules.py).
        align_param_gather=gathers and layout.vpp > 1,
    )


def wrap_stages(
    models: Sequence[GPTModel], config: TransformerConfig, ddp: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Returns the stages with gradient buffers, to which layers that can do so add their gradients themselves. Sets in
    `config` what the pipeline schedule calls for them.

    Call it once for a config: all stages share it. The functions are those that Megatron-LM's training.py sets.
    """
    stages = [
        DistributedDataParallel(config, ddp, model, disable_bucketing=index > 0) for index, model in enumerate(models)
    ]
    fuse_gradients(models)
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = _of_stages([stage.no_sync for stage in stages])
        config.grad_sync_func = _of_stages([stage.start_grad_sync for stage in stages])
    if ddp.align_param_gather:
        config.param_sync_func = _of_stages([stage.start_param_sync for stage in stages])
    return stages


def _of_stages(functions: list[Any]) -> Any:
    """Returns the functions as the schedule takes them: a list if there are virtual stages, else the one."""
    return functions if len(functions) > 1 else functions[0]


def gather_weights(stages: Sequence[Any]) -> None:
    """Gathers what an optimizer step has left to the next forward pass, for readers outside of one. Collective."""
    for stage in stages:
        if isinstance(stage, DistributedDataParallel) and stage.ddp_config.overlap_param_gather:
            stage.start_param_sync(force_sync=True)
