"""What a run was made with: the versions of its software and the state of its checkout."""

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
    """Versions by distribution name, None where it is not installed; with the platform and the core count."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"platform": platform.platform(), "cpu_count": os.cpu_count()}


@dataclass(frozen=True)
class GitState:
    """`diff` is that of tracked files against the commit; untracked files are named, not kept."""

    commit: str
    diff: str
    untracked: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        return bool(self.diff or self.untracked)


def git_state(tracked_file: Path) -> GitState | None:
    """State of the checkout that tracks `tracked_file`; None where none does, or git is not installed.

    A file that git does not track (a package installed below somebody else's checkout) has no commit to name.
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
    """Output of a git command, or None where it fails."""
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
