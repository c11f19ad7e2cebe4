"""The site file of `launch`: what a cluster wants to know besides the run, such as an image. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import Frozen, PositiveInt
from megatron_rl.config.load import raise_all
from megatron_rl.config.sources import ConfigError, shown
from megatron_rl.config.yaml12 import YamlError, read_yaml
from megatron_rl.launch.kubernetes_names import Image, Mount, Namespace, NodeLabel, ObjectName, Size

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)
TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,8})(?::(\d\d))?(?::(\d\d))?", re.ASCII)
OPTION = re.compile(r"-(-[a-z][a-z0-9-]*|[A-Za-z])([ =]?\S.*)?", re.ASCII)
EXPECTED = {"string_type": "text; put it in quotes", "tuple_type": "a list such as [a, b]"}
"""What is expected, by pydantic's name of the mistake, if its own words are those of a programmer."""
SCRIPTS = (
    *("nodes", "ntasks", "ntasks-per-node", "array", "wrap", "signal", "requeue", "no-requeue", "open-mode"),
    *("output", "chdir", "time", "job-name"),
)
"""Options that the script sets, or that would break it."""
SHORT = "NnaoDtJ"
"""Their letters."""
LATEST = 65535
"""Seconds; Slurm takes no longer warning."""
EARLIER = 60
"""Seconds by which Slurm may send a signal too early (sbatch's manual, --signal)."""


def _check_label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise PydanticCustomError("label", "at most 32 of a-z, 0-9 and -, a letter first and no - at the end")
    return text


def _check_time(text: str) -> str:
    if not seconds_of(text):
        raise PydanticCustomError("time", "a time of Slurm above 0, such as 24:00:00 or 2-12:00:00")
    return text


def seconds_of(text: str) -> int:
    """Returns the seconds of a time as sbatch reads --time: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes or days-hours:minutes:seconds; 0 if it is none of them."""
    found = TIME.fullmatch(text)
    if found is None:
        return 0
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    if any(part > 59 for part in given[1:]) or (days is not None and given[0] > 23):
        return 0
    hours_first = days is not None or len(given) == 3
    units = (3600, 60, 1) if hours_first else (60, 1)
    return (days or 0) * 86400 + sum(part * unit for part, unit in zip(given, units, strict=False))


def _check_line(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("line", "one line of text")
    return text


def _check_option(text: str) -> str:
    if not OPTION.fullmatch(text):
        raise PydanticCustomError("option", "an option of sbatch, such as --partition=gpu")
    name = re.split("[ =]", text.removeprefix("--"))[0]
    # sbatch takes the beginning of a long name too.
    if text[1] in SHORT or (text[1] == "-" and any(each.startswith(name) for each in SCRIPTS)):
        raise PydanticCustomError(
            "option", "an option that the script does not set itself; name and time are site keys"
        )
    return text


def _check_setup(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Bash reads the lines without running them."""
    if shutil.which("bash"):
        read = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True)
        if read.returncode:
            told = read.stderr.splitlines()[0].removeprefix("bash: ") if read.stderr else "bash cannot read them"
            raise PydanticCustomError("setup", "lines of bash ({told})", {"told": told})
    return lines


Label = Annotated[str, AfterValidator(_check_label)]
Line = Annotated[str, AfterValidator(_check_line)]
Option = Annotated[str, AfterValidator(_check_line), AfterValidator(_check_option)]
Time = Annotated[str, AfterValidator(_check_time)]


class SlurmSite(Frozen):
    time: Time = "24:00:00"
    """Limit of the job's time. At the limit the run is saved and queued again."""
    warning: Annotated[int, Field(ge=1, le=LATEST)] = 600
    """Seconds before the limit at which the trainer is told to save; more than a step and a checkpoint take."""
    options: tuple[Option, ...] = ()
    """More lines of #SBATCH, such as --partition=gpu."""
    setup: Annotated[tuple[Line, ...], AfterValidator(_check_setup)] = (
        f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:$PATH",
    )
    """Lines of bash that run once, on the first node, before anything starts; srun takes what they export to every
    node. `python` must be one that has megatron_rl."""


class KubernetesSite(Frozen):
    image: Image = "registry.example.com/megatron_rl:latest"
    """Image of docker/Dockerfile."""
    namespace: Namespace = "default"
    claim: ObjectName = "megatron-rl"
    """PersistentVolumeClaim, ReadWriteMany, with models, data and the run directory."""
    mount: Mount = PurePosixPath("/work")
    """Where pods see the claim. All paths of the configuration, and own code, must be below."""
    secret: ObjectName = "megatron-rl-server-key"
    """Secret whose field `key` holds the key of the servers."""
    trainer_secrets: tuple[ObjectName, ...] = ()
    """Secrets of which the trainer gets every field as an environment variable, such as WANDB_API_KEY."""
    shared_memory: Size = "64Gi"
    """Size of /dev/shm, which NCCL and SGLang use. It counts as memory of the pod."""
    restarts: PositiveInt = 100
    """How often a run that was stopped and saved (status 75) is started again."""
    node_selector: tuple[NodeLabel, ...] = ()
    """Labels KEY=VALUE that the nodes of the pods have."""
    grace: PositiveInt = 600
    """Seconds that an evicted trainer has to save."""

    @property
    def node_labels(self) -> dict[str, str]:
        return dict(label.split("=") for label in self.node_selector)


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
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: found {shown(values)}, expected keys such as name, slurm or kubernetes")
    # A section whose keys are all commented out is null.
    given = {key: value for key, value in (values or {}).items() if value is not None}
    try:
        site = Site.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        for mistake in error.errors():
            key = ".".join(map(str, mistake["loc"]))
            found = "no such key" if mistake["type"] == "extra_forbidden" else f"found {shown(mistake['input'])}"
            expected = EXPECTED.get(mistake["type"], mistake["msg"].removeprefix("Input should be "))
            told = "docs/launch.md lists the keys" if mistake["type"] == "extra_forbidden" else f"expected {expected}"
            problems.append(f"{places.get(key, path)}: {key}: {found}; {told}")
        raise_all(problems)
        raise
    problems += _warned_too_soon(site.slurm, f"{places.get('slurm.time', path)}: slurm.time")
    raise_all(problems)
    return site


def _warned_too_soon(slurm: SlurmSite, where: str) -> Iterator[str]:
    """A job that is warned when it starts would save nothing, and be queued again for ever."""
    limit = seconds_of(slurm.time)
    if limit <= slurm.warning + EARLIER:
        yield (
            f"{where}: found {slurm.time}, which is {limit} s; expected more than slurm.warning, {slurm.warning} s, "
            f"and the {EARLIER} s by which Slurm may warn too early"
        )
