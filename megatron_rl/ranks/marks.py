"""A file that rank 0 writes near the future run directory. A rank that sees the file shares the directory."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tenacity

from megatron_rl.config.load import ConfigError

SEEN_SECONDS = 10.0
"""Seconds to look for the mark: a network file system may show a new file late."""


@dataclass(frozen=True)
class Mark:
    """The file `name`, in the directory `levels` above the run directory: the nearest one that exists."""

    run_dir: str
    host: str
    levels: int
    name: str

    def is_seen_from(self, run_dir: Path) -> bool:
        """Whether this rank's `run_dir` is the directory of the mark's rank."""
        above = [run_dir.absolute(), *run_dir.absolute().parents]
        if self.levels >= len(above):
            return False
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(SEEN_SECONDS),
            wait=tenacity.wait_fixed(0.2),
            retry=tenacity.retry_if_result(lambda seen: not seen),
            retry_error_callback=lambda _: False,
        )
        return bool(retrying((above[self.levels] / self.name).is_file))


@contextlib.contextmanager
def leave_mark(run_dir: Path) -> Iterator[Mark]:
    """Keeps the mark while the body runs. Raises ConfigError if the run directory cannot be written."""
    above = [run_dir.absolute(), *run_dir.absolute().parents]
    try:
        levels, directory = next((n, path) for n, path in enumerate(above) if path.exists())
        mark = Mark(str(run_dir.absolute()), socket.gethostname(), levels, f".megatron-rl-{secrets.token_hex(8)}")
        file = directory / mark.name
        file.touch(exist_ok=False)
    except OSError as error:
        raise ConfigError(f"run_dir: {error.filename} cannot be written: {error.strerror}") from None
    try:
        yield mark
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
