"""What the keys of an optimizer say together, and with the engine's. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config.schema import EngineConfig, OptimConfig


def check_optim(optim: OptimConfig, section: str, engine: EngineConfig) -> Iterator[str]:
    """Yields one line for each contradiction in `section`, optim or critic.optim."""
    if optim.schedule != "constant":
        yield from _check_schedule(optim, section)
    yield from _check_memory(optim, section, engine)


def memory_settings(optim: OptimConfig) -> dict[str, str]:
    """Returns the settings of the optimizer's memory that need a GPU and Transformer Engine, with their defaults."""
    settings = {}
    if optim.moments_dtype == "bf16":
        settings["moments_dtype: bf16"] = "fp32"
    if optim.offload:
        settings[f"offload: {optim.offload:g}"] = "0"
    return settings


def _check_schedule(optim: OptimConfig, section: str) -> Iterator[str]:
    if optim.decay_steps <= optim.warmup_steps:
        yield (
            f"{section}.decay_steps: {optim.decay_steps}, but {section}.schedule {optim.schedule} needs more than "
            f"{section}.warmup_steps {optim.warmup_steps}"
        )
    if optim.min_lr > optim.lr:
        yield f"{section}.min_lr: {optim.min_lr} is above {section}.lr {optim.lr}"


def _check_memory(optim: OptimConfig, section: str, engine: EngineConfig) -> Iterator[str]:
    settings = memory_settings(optim)
    for setting, plain in settings.items():
        if engine.device == "cpu":
            yield f"{section}.{setting} needs a GPU, but engine.device is cpu; set it to {plain}"
        if engine.dtype == "fp32":
            # Megatron-Core would not step fp32 weights that stay on the GPU.
            yield f"{section}.{setting} needs engine.dtype bf16, but that is fp32; set it to {plain}"
    if len(settings) > 1:
        yield (
            f"{section}.moments_dtype: bf16, but moments in the host's memory ({section}.offload) are fp32; set one of "
            "the two to its default"
        )
