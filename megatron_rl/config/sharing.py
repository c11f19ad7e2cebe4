"""What rollout.servers.colocate needs of the other keys and of the machine. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config.optim import memory_settings
from megatron_rl.config.schema import Config
from megatron_rl.config.server_flags import flag_value, flags_among
from megatron_rl.config.sources import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.registry import weights_of

KEY = "rollout.servers.colocate: true"
FRACTION = "--mem-fraction-static"
GIB = 1 << 30
_PLACES = ("--base-gpu-id", "--gpu-id-step", "--pp-size", "--pipeline-parallel-size", "--dp-size")
"""Flags after which a server's ranks are not on the GPUs of as many trainer ranks."""


def check_sharing(config: Config, arch: Architecture, world_size: int) -> Iterator[str]:
    """Yields one line for each key that contradicts rollout.servers.colocate, and for a route that needs it."""
    servers, route = config.rollout.servers, config.weights.route
    if config.rollout.replay_from is not None:
        return
    if not servers.colocate:
        if route == "ipc":
            yield "weights.route: ipc needs servers on the trainer's GPUs; set rollout.servers.colocate to true"
        return
    if servers.are_elsewhere:
        yield f"{KEY}, but rollout.servers.urls or urls_file names servers that run elsewhere; drop one of the two"
        return
    if servers.launch * servers.tp != world_size:
        even = world_size % servers.tp == 0
        fit = f"set launch to {world_size // servers.tp}" if even else "set a tp that divides them"
        yield (
            f"rollout.servers: launch {servers.launch} with tp {servers.tp} use {servers.launch * servers.tp} GPUs, "
            f"but colocate shares those of all {world_size} ranks; {fit}"
        )
    if route == "collective":
        yield f"weights.route: collective, but under {KEY} NCCL would have two processes on a GPU; set it to ipc"
    if route == "delta":
        yield (
            f"weights.route: delta sends what changed, but under {KEY} servers lose their weights in each step; set it "
            "to ipc"
        )
    for flag in flags_among(servers.extra_flags, _PLACES):
        yield f"rollout.servers.extra_flags: {flag} moves servers to other GPUs than those of {KEY}; drop it"
    fraction = flag_value(servers.extra_flags, FRACTION)
    if fraction is not None and not _is_fraction(fraction):
        yield f"rollout.servers.extra_flags: {FRACTION}: found {fraction!r}, expected a number between 0 and 1"
    if config.engine.fp8 != "none":
        yield (
            f"engine.fp8: {config.engine.fp8}, but under {KEY} its copies of weights would stay on the GPU; set it to "
            "none"
        )
    for section, optim in (("optim", config.optim), ("critic.optim", config.critic and config.critic.optim)):
        for setting in memory_settings(optim) if optim else ():
            yield (
                f"{section}.{setting}: such an optimizer steps the model's own weights, and Megatron-Core cannot move "
                f"it under {KEY}; leave it at its default"
            )


def check_machine(ranks: int, here: int) -> None:
    """Raises ConfigError if not all ranks are here, on one machine."""
    if here != ranks:
        raise ConfigError(
            f"{KEY}: {ranks} ranks are on several machines ({here} on this one), and the trainer starts servers on "
            "one; start all ranks on one machine, or set it to false"
        )


def served_bytes(arch: Architecture, tp: int, item: int) -> int:
    """Returns the bytes of each GPU that a server's weights take, with `item` bytes an element."""
    return sum(weight.elements() for weight in weights_of(arch) if not weight.copy) * item // tp


def fraction_problem(config: Config, arch: Architecture, item: int, gpu_bytes: int) -> str | None:
    """Says why --mem-fraction-static leaves a server no room for its weights; None if it does not."""
    servers = config.rollout.servers
    text = flag_value(servers.extra_flags, FRACTION) or "1"
    needed, given = served_bytes(arch, servers.tp, item), float(text) * gpu_bytes
    if needed < given:
        return None
    return (
        f"rollout.servers.extra_flags: {FRACTION} {text} gives a server {given / GIB:.1f} GiB of each GPU, but "
        f"its weights take {needed / GIB:.1f}; raise it above {needed / gpu_bytes:.2f}, or raise rollout.servers.tp"
    )


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
