"""What a rank can check of its surroundings before it joins the others. `megatron-rl check` prints the same checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.servers import CPU_ADVICE, cpu_problem
from megatron_rl.config.sharing import check_machine
from megatron_rl.config.sources import ConfigError
from megatron_rl.environments.episodes import check_environment
from megatron_rl.models.architecture import read_architecture
from megatron_rl.objectives.custom import get_objective
from megatron_rl.ranks.own_device import check_deterministic, resolve_device
from megatron_rl.ranks.world import read_world
from megatron_rl.rewards import check_verifier
from megatron_rl.rollout.pool import read_server_key
from megatron_rl.rollout.server import require_sglang

StartCheck = tuple[str, Callable[[], str]]
"""The key that is checked, and what returns what was found, or raises UserError."""


def check_start(config: Config | SftConfig) -> None:
    """Raises the UserError of the first check that fails."""
    for _, check in start_checks(config):
        check()


def start_checks(config: Config | SftConfig) -> Iterator[StartCheck]:
    """Yields the checks of the device, of servers to be started, and of own code."""
    yield "engine.device", lambda: _check_device(config)
    if isinstance(config, SftConfig):
        return
    samples = config.rollout.replay_from is None
    if samples and not config.rollout.servers.are_elsewhere:
        yield "rollout.servers", lambda: _check_launched(config)
    if config.rollout.servers.api_key_env:
        yield "rollout.servers.api_key_env", lambda: _check_key(config)
    if config.objective.custom is not None:
        yield "objective.custom", lambda: _check_objective(config)
    if samples and config.data.verifier is not None:
        yield "data.verifier", lambda: _check_verifier(config)
    if samples and config.rollout.environment is not None:
        yield "rollout.environment.name", lambda: _check_environment(config)


def _check_device(config: Config | SftConfig) -> str:
    device = resolve_device(config.engine.device)
    check_deterministic(config.engine)
    return str(device)


def _check_launched(config: Config) -> str:
    servers, world = config.rollout.servers, read_world()
    on_cpu = resolve_device(config.engine.device).type == "cpu"
    if servers.colocate:
        check_machine(world.size, world.local_size)
    if on_cpu and (problem := cpu_problem(read_architecture(config.model.path))):
        raise ConfigError(f"engine.device: {config.engine.device} is the CPU here, but {problem}; {CPU_ADVICE}")
    if world.rank == 0:  # which starts them
        require_sglang(on_cpu=on_cpu)
    return f"{servers.launch} of SGLang would be started"


def _check_key(config: Config) -> str:
    read_server_key(config)
    return f"{config.rollout.servers.api_key_env} holds a key"


def _check_objective(config: Config) -> str:
    get_objective(config.objective)
    return f"{config.objective.custom} takes inputs, config and denominators"


def _check_verifier(config: Config) -> str:
    check_verifier(config)
    return f"{config.data.verifier} is there"


def _check_environment(config: Config) -> str:
    assert config.rollout.environment is not None
    check_environment(config)
    return f"{config.rollout.environment.name} is there"
