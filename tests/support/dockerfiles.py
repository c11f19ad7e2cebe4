"""Reads Dockerfiles, and executes their steps in a Debian of debootstrap, as root and without a docker engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PIP_FILES = ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf")


@dataclass(frozen=True)
class Step:
    word: str
    """RUN, COPY and so on."""
    text: str


def read_steps(file: Path) -> list[Step]:
    """Returns the steps in order, without comments and with continued lines joined as the shell joins them."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    steps = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [Step(word, rest.strip()) for word, _, rest in steps]


@contextmanager
def debian(root: Path) -> Iterator[Path]:
    """Makes a minimal Debian in `root`, with this machine's name servers, certificates and package indexes."""
    with ExitStack() as stack:
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True, capture_output=True)
        for name in ("etc/resolv.conf", "etc/hosts"):
            shutil.copy(f"/{name}", root / name)
        for source in _shared():
            target = root / source.relative_to("/")
            target.mkdir(parents=True, exist_ok=True) if source.is_dir() else target.parent.mkdir(
                parents=True, exist_ok=True
            )
            if source.is_file():
                target.touch()
            _mount(stack, ["--bind", str(source)], target)
        _mount(stack, ["-t", "proc", "proc"], root / "proc")
        _mount(stack, ["--bind", "/dev"], root / "dev")
        yield root


def _mount(stack: ExitStack, words: list[str], target: Path) -> None:
    subprocess.run(["mount", *words, str(target)], check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(target)], check=True)


def _shared() -> Iterator[Path]:
    """Yields what pip reads on this machine: its files, certificates and local indexes."""
    yield from (path for text in PIP_FILES if (path := Path(text).expanduser()).is_file())
    yield from (path for path in (Path("/etc/ssl/certs"), Path("/usr/share/ca-certificates")) if path.is_dir())
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"(?:file://)?(/[^\s'\"]+)", told) + os.environ.get("PIP_FIND_LINKS", "").split()
    folders = {Path(urlsplit(text).path) for text in found if Path(urlsplit(text).path).is_dir()}
    yield from sorted(folder for folder in folders if not any(other in folder.parents for other in folders))


def run_in(root: Path, steps: list[Step], context: Path, arguments: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Executes the steps after FROM; yields each RUN's text, status and output, and stops at one that fails."""
    shell = ["/bin/sh", "-c"]
    folder = Path("/")
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **kept}
    for step in steps:
        if step.word == "SHELL":
            shell = json.loads(step.text)
        elif step.word == "WORKDIR":
            folder = Path(step.text)
            (root / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
        elif step.word in ("ENV", "ARG"):
            for name, value in re.findall(r"(\w+)=(\S+)", step.text):
                environment[name] = arguments.get(name, os.path.expandvars(value.replace("$PATH", environment["PATH"])))
        elif step.word == "COPY":
            *sources, target = step.text.split()
            for source in sources:
                _copy(context / source, root / (folder / target).relative_to("/"), into=target.endswith("/"))
        elif step.word == "RUN":
            inside = ["chroot", str(root), "/usr/bin/env", "-C", str(folder), *shell, step.text]
            done = subprocess.run(inside, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            yield step.text, done.returncode, done.stdout
            if done.returncode:
                return


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True) if into else target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
