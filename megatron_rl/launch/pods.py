"""What pods would lack: files and own code outside of the volume, and variables that no Secret gives. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.load import raise_all
from megatron_rl.config.resolve import model_dirs
from megatron_rl.config.schema import Config
from megatron_rl.data.generated import is_generated
from megatron_rl.launch.site import KubernetesSite
from megatron_rl.named_code import own_file


def check_pods(config: Config, site: KubernetesSite) -> None:
    """Raises ConfigError with all that pods would not see, if they start in `working_directory`."""
    raise_all([*_unseen_files(config, Path(site.mount)), *_missing_variables(config, site)])


def working_directory(site: KubernetesSite) -> Path:
    """Returns where pods start: here, as relative paths and own code are relative to it, if they see this directory."""
    here, mount = Path.cwd(), Path(site.mount)
    return here if here.is_relative_to(mount) else mount


def _unseen_files(config: Config, mount: Path) -> Iterator[str]:
    for key, path in _paths(config):
        if not (Path.cwd() / path).is_relative_to(mount):
            yield (
                f"{key}: {path}, but pods see the volume alone, which is mounted at {mount}; put it there and run "
                "launch below, or change kubernetes.mount in the site file"
            )
    for key, file in _own_modules(config):
        if file.parent != Path.cwd() or not file.is_relative_to(mount):
            yield (
                f"{key}: {file}, but pods import what is installed, and what lies in the directory of launch if they "
                f"see that: it is below {mount}. Put it there and run launch there, or install it in the image"
            )


def _paths(config: Config) -> Iterator[tuple[str, Path]]:
    yield from ((key, path) for key, path, _ in model_dirs(config))
    named = {
        "run_dir": config.run_dir,
        "rollout.replay_from": config.rollout.replay_from,
        "rollout.servers.urls_file": config.rollout.servers.urls_file,
    }
    yield from ((key, path) for key, path in named.items() if path is not None)
    data = {"data.train": config.data.train, "data.heldout": config.data.heldout}
    yield from ((key, Path(text)) for key, text in data.items() if text is not None and not is_generated(text))


def _own_modules(config: Config) -> Iterator[tuple[str, Path]]:
    """Yields the files of the user's own modules. What is installed is taken to be in the image too."""
    environment = config.rollout.environment
    names = {
        "data.verifier": config.data.verifier,
        "objective.custom": config.objective.custom,
        "rollout.environment.name": None if environment is None else environment.name,
    }
    for key, name in names.items():
        if name is not None and (file := own_file(name)) is not None:
            yield key, file


def _missing_variables(config: Config, site: KubernetesSite) -> Iterator[str]:
    if site.trainer_secrets:
        return
    needed = [f"reward.environment: {name}" for name in config.reward.environment]
    if config.lab.wandb is not None:
        needed.append("lab.wandb: WANDB_API_KEY")
    for variable in needed:
        yield f"{variable}, which pods lack; name a Secret that has it in kubernetes.trainer_secrets of the site file"
