"""Records the versions of a run's software and the state of its checkout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "sglang",
    "megatron_rl",
)


def versions() -> dict[str, str | int | None]:
    """Versions by distribution name, None if it is not installed; with the platform and the core count."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"platform": platform.platform(), "cpu_count": os.cpu_count()}


@dataclass(frozen=True)
class GitState:
    """`diff` compares tracked files with the commit. Untracked files are named; their content is not kept."""

    commit: str
    diff: str
    untracked: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        return bool(self.diff or self.untracked)


def git_state(tracked_file: Path) -> GitState | None:
    """State of the checkout that tracks `tracked_file`; None if git does not track it or is not installed.

    A package installed below another project's checkout is not tracked there, so it has no commit.
    """
    here = tracked_file.resolve().parent
    if _git(here, "ls-files", "--error-unmatch", "--", tracked_file.name) is None:
        return None
    top, commit = _git(here, "rev-parse", "--show-toplevel"), _git(here, "rev-parse", "HEAD")
    if top is None or commit is None:
        return None
    root = Path(top.strip())
    diff = _git(root, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--directory", "-z")
    if diff is None or untracked is None:
        return None
    return GitState(commit.strip(), diff, tuple(name for name in untracked.split("\0") if name))


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command, or None if it fails."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=directory,
            capture_output=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "backslashreplace")
