"""Writes files that survive a crash, and says in plain words why one could not be written. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import UserError


class DiskError(UserError):
    """Names the file that could not be written, the reason, and the space left on its disk."""


LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of one name, and of a whole path, that file systems on Linux take."""


def expected_of(path: str | Path) -> str:
    """Returns what a path must be and is not; "" if it can be a file's."""
    text = str(path)
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in text.split("/")):
        return f"a path whose names have at most {LONGEST_NAME} bytes each"
    if len(os.fsencode(text)) > LONGEST_PATH:
        return f"a path of at most {LONGEST_PATH} bytes"
    return ""


@contextlib.contextmanager
def writes(what: str, path: Path, then: str = "--resume") -> Iterator[None]:
    """Turns an OSError of the body into a DiskError: `what` was not written below `path`. A UserError stays as it is.

    `then`: what to do once the disk has space.
    """
    try:
        yield
    except UserError:  # some are OSErrors too
        raise
    except OSError as error:
        raise DiskError(f"{what} was not written: {explain(error, path, then)}") from error


def explain(error: OSError, path: Path, then: str = "--resume") -> str:
    """Returns the file, the system's reason and the free space of the file's disk."""
    where = error.filename or path
    reason = (error.strerror or str(error)).lower()
    there = Path(path)
    while not os.path.exists(there) and there != there.parent:
        there = there.parent
    try:
        free = f"; {size(shutil.disk_usage(there).free)} free there"
    except OSError:
        free = ""
    mend = f". Free some space, and {then}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}: {reason}{free}{mend}"


def size(count: float) -> str:
    """Returns a number of bytes in the largest fitting unit, such as 2.1 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def write_durably(path: Path, data: bytes) -> None:
    """Replaces the file's content by `data` atomically; returns once it is on the disk."""
    write_whole(path, data)
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces the file's content by `data` atomically. Needs nothing of its directory afterwards."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def create_once(file: Path, content: Path) -> bool:
    """Creates the file with the content of another; returns False if it exists already. Of several processes that do
    this, one creates the file."""
    try:
        os.link(content, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        try:  # a file system without links: the file is incomplete for a moment
            with file.open("xb") as stream:
                stream.write(content.read_bytes())
        except FileExistsError:
            return False
    return True


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
