"""Reads Dockerfiles, and executes their steps in a Debian of debootstrap, as root and without a docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
HOSTS_BUNDLE = Path("/root/certificates-of-the-host.crt")
"""A copy beside the Debian's own, which its package ca-certificates writes."""
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


def make_debian(root: Path) -> None:
    """Makes a minimal Debian in `root`, with copies of what this machine's pip reads and of its name servers."""
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True, capture_output=True)
    for file in (Path("/etc/resolv.conf"), Path("/etc/hosts"), *(Path(text).expanduser() for text in PIP_FILES)):
        if file.is_file():
            target = root / file.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    if BUNDLE.is_file():
        shutil.copy(BUNDLE, root / HOSTS_BUNDLE.relative_to("/"))


def _indexes() -> list[Path]:
    """Returns the folders of this machine that its pip takes packages from."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"(/[^\s'\"]+)", told.replace("file://", "")) + os.environ.get("PIP_FIND_LINKS", "").split()
    folders = {path for text in found if (path := Path(text.removeprefix("file://"))).is_dir()}
    # An index of links has the files beside it.
    return sorted({path.parent if path.name == "simple" else path for path in folders})


def _inside(root: Path, words: list[str]) -> list[str]:
    """Returns a command that runs `words` in `root`. Its mounts are its own, and nothing of the host can be written."""
    lines = ["set -eu", f"mount -t proc proc {root}/proc", f"mount -t tmpfs tmpfs {root}/dev/shm"]
    for folder in _indexes():
        target = shlex.quote(str(root / folder.relative_to("/")))
        lines += [f"mkdir -p {target}", f"mount --bind {shlex.quote(str(folder))} {target}"]
        lines += [f"mount -o remount,bind,ro {target}"]
    lines.append(f"exec chroot {root} {shlex.join(words)}")
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines)]


def run_in(root: Path, steps: list[Step], context: Path, arguments: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Executes the steps after FROM; yields each RUN's text, status and output, and stops at one that fails."""
    shell = ["/bin/sh", "-c"]
    folder = Path("/")
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    if BUNDLE.is_file():
        kept |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), str(HOSTS_BUNDLE))
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
            words = _inside(root, ["/usr/bin/env", "-C", str(folder), *shell, step.text])
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            yield step.text, done.returncode, done.stdout
            if done.returncode:
                return


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True) if into else target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
