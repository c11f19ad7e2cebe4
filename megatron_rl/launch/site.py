"""The site file of `launch`: what a cluster wants to know besides the run, such as an image. Imports no torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import Frozen, PositiveInt
from megatron_rl.config.load import raise_all
from megatron_rl.config.sources import ConfigError, shown
from megatron_rl.config.yaml12 import YamlError, read_yaml

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}", re.ASCII)


def _check_label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise PydanticCustomError("label", "at most 32 of a-z, 0-9 and -, a letter first and no - at the end")
    return text


def _check_time(text: str) -> str:
    if not TIME.fullmatch(text):
        raise PydanticCustomError("time", "a time of Slurm, such as 24:00:00 or 2-12:00:00")
    return text


def _check_line(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("line", "one line of text")
    return text


Label = Annotated[str, AfterValidator(_check_label)]
Line = Annotated[str, AfterValidator(_check_line)]
Time = Annotated[str, AfterValidator(_check_time)]


class SlurmSite(Frozen):
    time: Time = "24:00:00"
    """Limit of the job's time. At the limit the run is saved and queued again."""
    warning: PositiveInt = 600
    """Seconds before the limit at which the trainer is told to save; more than a step and a checkpoint take."""
    options: tuple[Line, ...] = ()
    """More lines of #SBATCH, such as --partition=gpu."""
    setup: tuple[Line, ...] = (f"export PATH={Path(sys.prefix) / 'bin'}:$PATH",)
    """Lines of bash on every node before anything starts. `python` must be one that has megatron_rl."""


class KubernetesSite(Frozen):
    image: Line = "registry.example.com/megatron_rl:latest"
    """Image of docker/Dockerfile."""
    namespace: Label = "default"
    claim: Line = "megatron-rl"
    """PersistentVolumeClaim, ReadWriteMany, with models, data and the run directory."""
    mount: Path = Path("/work")
    """Where pods see the claim. All paths of the configuration must be below."""
    secret: Line = "megatron-rl-server-key"
    """Secret whose field `key` holds the key of the servers."""
    shared_memory: Line = "64Gi"
    """Size of /dev/shm, which NCCL and SGLang use. It counts as memory of the pod."""
    restarts: PositiveInt = 100
    """How often a run that was stopped and saved (status 75) is started again."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    grace: PositiveInt = 600
    """Seconds that an evicted trainer has to save."""


class Site(Frozen):
    name: Label = "megatron-rl"
    """Name of the job, and beginning of the names of what is in it."""
    slurm: SlurmSite = SlurmSite()
    kubernetes: KubernetesSite = KubernetesSite()


def read_site(path: Path | None) -> Site:
    """Returns the defaults without a path. Raises ConfigError with all mistakes: place, what was found and expected."""
    if path is None:
        return Site()
    problems: list[str] = []
    try:
        values, places = read_yaml(path.read_text("utf-8-sig"), lambda line: f"{path}:{line}", problems)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site {path}: {error}; expected a YAML file (docs/launch.md)") from None
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {shown(values)}, expected keys such as name, slurm or kubernetes")
    try:
        site = Site.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for mistake in error.errors():
            key = ".".join(map(str, mistake["loc"]))
            found = "no such key" if mistake["type"] == "extra_forbidden" else f"found {shown(mistake['input'])}"
            expected = mistake["msg"].removeprefix("Input should be ")
            told = "docs/launch.md lists the keys" if mistake["type"] == "extra_forbidden" else f"expected {expected}"
            problems.append(f"{places.get(key, path)}: {key}: {found}; {told}")
        raise_all(problems)
        raise
    raise_all(problems)
    return site
