"""What frozen kinds of weights say together with the model and with other keys. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config.schema import Config, OptimConfig, SftConfig
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.registry import kinds_of


def check_freeze(optim: OptimConfig, section: str, arch: Architecture) -> Iterator[str]:
    """Yields one line for each mistake in the section's `freeze`; `arch` is the architecture of its network."""
    if not optim.freeze:
        return
    held = kinds_of(arch)
    for kind in optim.freeze:
        if kind not in held:
            yield f"{section}.freeze: {kind}, but the model has no such weights; it has {', '.join(held)}"
    if not set(held) - set(optim.freeze):
        yield f"{section}.freeze: {', '.join(optim.freeze)} are all weights of the model; leave one out, or none trains"


def freeze_notes(config: Config | SftConfig) -> Iterator[str]:
    """Yields one line for each key that does less than it says, because weights are frozen."""
    coefficient = config.engine.aux_loss_coefficient
    sections = {"optim": config.optim}
    if isinstance(config, Config) and config.critic is not None:
        sections["critic.optim"] = config.critic.optim
    for section, optim in sections.items():
        if coefficient and "router" in optim.freeze:
            yield (
                f"engine.aux_loss_coefficient: {coefficient} moves no router, because {section}.freeze has router; the "
                "load-balancing loss only trains what the routers read"
            )
