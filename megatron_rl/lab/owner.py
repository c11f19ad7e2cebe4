"""Owns a run directory: only the owner process may write to it.

`owner-N.json` names the N-th owner: host, process, and start time. The owner touches its file every BEAT_SECONDS. A new
start takes over from an owner that has ended. An owner has ended if it said so or if its process is gone from this
machine. An owner on another machine has ended if it did not touch its file for SILENT_SECONDS.

To take over, a process creates the file of the next number, which only one of several can do. The highest number is the
owner, and only an owner deletes lower ones. So there is always exactly one owner. The file system must only create a
file exclusively, which NFS can do; locks do not work on every file system. Ages are differences of times from the file
system, so the clocks of two machines need not agree.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import orjson
import psutil

from megatron_rl.disk import create_once
from megatron_rl.errors import UserError

BEAT_SECONDS = 15.0
SILENT_SECONDS = 180.0
"""Seconds without a touch after which an owner has ended. A network file system may show a time a minute late."""
WATCH_SECONDS = 1.0
_FILE = re.compile(r"owner-(\d{6})\.json")
# Two readings of the start of one process may differ, because the machine's boot time is rounded.
_SAME_START_SECONDS = 2.0


class OwnerError(UserError):
    """Another process writes to the run directory."""


class Owner:
    """Holds a run directory from `take` to `release` or `withdraw`."""

    def __init__(self, file: Path, replaces: list[Path]) -> None:
        self._file = file
        self._replaces = replaces
        self._ended = threading.Event()
        self.lost = ""
        """Reason why this process may no longer write; empty if it may."""
        self._thread = threading.Thread(target=self._beat, name="run-owner", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, directory: Path, *, sleep: Callable[[float], None] = time.sleep) -> Self:
        """Makes this process the owner of an existing directory.

        If a silent owner is on another machine, waits up to SILENT_SECONDS to see whether it has ended. Raises
        OwnerError if the owner is alive, and OSError if the directory cannot be written.
        """
        mine = directory / f".owner-{uuid.uuid4().hex}"
        try:
            mine.write_bytes(orjson.dumps(_myself()))
            while True:
                owners = _owners(directory)
                if owners:
                    _wait_for_end(owners[-1], mine, sleep)
                number = _number(owners[-1]) + 1 if owners else 1
                file = directory / f"owner-{number:06d}.json"
                if not create_once(file, mine):
                    continue  # another process was faster: look at its file
                if _owners(directory)[-1] == file:
                    return cls(file, owners)
                file.unlink()  # a newer owner exists
        finally:
            mine.unlink(missing_ok=True)

    def settle(self) -> None:
        """Deletes the files of earlier owners. Until then `withdraw` leaves the directory as it was."""
        for file in self._replaces:
            file.unlink(missing_ok=True)
        self._replaces = []

    def release(self) -> None:
        """Records that this owner has ended, so that the next start need not wait."""
        self._stop()
        if not self.lost:
            said = self._file.with_name(f".{self._file.name}")
            try:
                said.write_bytes(orjson.dumps({**_read(self._file), "ended": time.time()}))
                os.replace(said, self._file)
            finally:
                said.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Returns the directory to its earlier owner, as if this owner had never existed."""
        self._stop()
        self._file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises OwnerError if another process has taken the directory, which can happen after a long standstill."""
        owners = _owners(self._file.parent)
        if not owners or owners[-1] != self._file:
            taker = _who(_read(owners[-1])) if owners else "nobody: its owner file was deleted"
            self.lost = (
                f"run_dir {self._file.parent} belongs to {taker} now; this process stood still for more than "
                f"{SILENT_SECONDS:g} s and was taken for dead. It ends here and writes nothing more"
            )
            raise OwnerError(self.lost)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(self._file)
            except FileNotFoundError:
                return  # `check` says why
            except OSError:
                continue  # a network file system may be away for a while

    def _stop(self) -> None:
        self._ended.set()
        self._thread.join()


def refuse_living(directory: Path) -> None:
    """Raises OwnerError if the directory's owner lives on this machine; does not wait for one on another machine."""
    if owners := _owners(directory):
        owner = _read(owners[-1])
        if "ended" not in owner and owner.get("machine") == _machine() and _runs(owner):
            raise OwnerError(_refusal(owners[-1], owner))


def _wait_for_end(file: Path, mine: Path, sleep: Callable[[float], None]) -> None:
    """Waits until the owner has ended. Raises OwnerError at its first sign of life."""
    try:
        seen = file.stat().st_mtime
    except FileNotFoundError:
        return  # its successor deleted it: the caller looks again
    owner = _read(file)
    if "ended" in owner:
        return
    if owner.get("machine") == _machine():
        if _runs(owner):
            raise OwnerError(_refusal(file, owner))
        return
    told = False
    while True:
        os.utime(mine)
        age = mine.stat().st_mtime - seen
        if age > SILENT_SECONDS:
            return
        if not told:
            told = True
            left = SILENT_SECONDS - age
            print(
                f"run_dir {file.parent} belongs to {_who(owner)}, silent for {max(age, 0.0):.0f} s: "
                f"waiting up to {left:.0f} s for a sign of life",
                flush=True,
            )
        sleep(WATCH_SECONDS)
        try:
            if file.stat().st_mtime != seen:
                raise OwnerError(_refusal(file, owner))
        except FileNotFoundError:
            return


def _refusal(file: Path, owner: dict[str, Any]) -> str:
    return (
        f"run_dir {file.parent} is in use by {_who(owner)}. End that process, wait for its end, or name another "
        f"run_dir. If the directory is a copy of one in use, delete {file}"
    )


def _who(owner: dict[str, Any]) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(owner["since"]))
        return f"process {owner['pid']} on {owner['host']}, which began at {since}"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "a process that its owner file does not name"


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the process still runs on this machine. A new process with the same number does not count."""
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["started"]) < _SAME_START_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def _myself() -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": started,
        "since": time.time(),
    }


def _machine() -> str:
    """Name of the machine since its last boot and, on Linux, of the container: process numbers are unique within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _owners(directory: Path) -> list[Path]:
    """Returns the owner files, oldest first."""
    return sorted((f for f in directory.iterdir() if _FILE.fullmatch(f.name)), key=_number)


def _number(file: Path) -> int:
    match = _FILE.fullmatch(file.name)
    assert match is not None
    return int(match[1])


def _read(file: Path) -> dict[str, Any]:
    """Returns the content of the file; {} if it is damaged or gone. Then only its age counts."""
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
