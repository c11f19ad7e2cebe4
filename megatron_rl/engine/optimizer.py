"""Megatron-Core's distributed Adam and its learning-rate schedule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.optim import memory_settings
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.errors import UserError
from megatron_rl.models.weights_io import torch_dtype


def optimizer_config(config: OptimConfig, engine: EngineConfig) -> OptimizerConfig:
    dtype = torch_dtype(engine.dtype)
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        **_memory(config, engine),
    )


def _memory(config: OptimConfig, engine: EngineConfig) -> dict[str, Any]:
    """Returns the fields that say where the optimizer keeps fp32 weights and moments, and in which dtypes."""
    if not memory_settings(config):
        return {}
    moments = torch_dtype(config.moments_dtype)
    return {
        # The optimizer steps the bf16 weights themselves, for offload too: else the GPU would keep fp32 copies.
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": torch_dtype(engine.grad_dtype),
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        "optimizer_cpu_offload": config.offload > 0,
        "optimizer_offload_fraction": config.offload,
        # Gradients in bf16 are made fp32 on the stream of the copies, which the step on the GPU does not wait for.
        "overlap_cpu_optimizer_d2h_h2d": config.offload > 0 and engine.grad_dtype == "fp32",
    }


def check_machine(config: OptimConfig, section: str, device: torch.device) -> None:
    """Raises UserError if the machine lacks what `section` asks for, which engine.device auto does not say before."""
    for setting in memory_settings(config):
        if device.type == "cpu":
            raise UserError(f"{section}.{setting} needs a GPU, and there is none; leave it at its default")
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                f"{section}.{setting} needs Transformer Engine's FusedAdam, but transformer_engine is not installed; "
                "install the extra [te], or leave it at its default"
            )


def build_optimizer(
    config: OptimConfig, stages: Sequence[DistributedDataParallel], engine: EngineConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    optimizer = get_megatron_optimizer(optimizer_config(config, engine), list(stages), use_gloo_process_groups=False)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        # Megatron-Core wants a length even for a constant rate, and one beyond the warm-up.
        lr_decay_steps=max(config.decay_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resume may have another schedule: it takes the count of steps from the checkpoint, and nothing else.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Returns Megatron-Core's optimizers: one for dense parameters, one for experts."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
