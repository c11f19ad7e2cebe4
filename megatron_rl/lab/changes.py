"""What resumes have changed of a run's configuration: changes.jsonl, one line for each key.

A line says from which step on a value holds. So a resume from an earlier checkpoint takes the lines of the steps that
it makes again out, as it does with metrics, and says anew what differs from the configuration of that checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.disk import write_durably
from megatron_rl.lab.run_records import ABSENT, Flat, History, RunDirError, differing, shown_value

CHANGES_FILE = "changes.jsonl"


@dataclass(frozen=True)
class ChangedKey:
    step: int
    """The checkpoint's from which a resume went on: the new value holds after this step."""
    time: float
    """Seconds since 1970."""
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown_value(self.old)} up to step {self.step}, {shown_value(self.new)} from then on"


def read_changes(run_dir: Path) -> list[ChangedKey]:
    """Returns the lines of changes.jsonl, oldest first. Raises RunDirError, which names the file and the line."""
    file = run_dir / CHANGES_FILE
    if not file.exists():
        return []
    changes = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            change = ChangedKey(**orjson.loads(line))
            whole = type(change.step) is int and isinstance(change.key, str)
        except (orjson.JSONDecodeError, TypeError):
            whole = False
        if not whole:
            raise RunDirError(
                f"{file}, line {number}: expected an object with step, time, key, old and new. Remove it."
            )
        changes.append(change)
    return changes


def config_at(step: int, frozen: Flat, changes: Iterable[ChangedKey]) -> dict[str, Any]:
    """Returns the configuration that was in force when `step` was made: what the run's newest start has frozen, without
    the changes from `step` on."""
    config = dict(frozen)
    for change in reversed([each for each in changes if each.step >= step]):
        config[change.key] = change.old
    return {key: value for key, value in config.items() if value != ABSENT}


def record_changes(run_dir: Path, step: int, frozen: Flat, asked: Flat, history: History) -> list[ChangedKey]:
    """Rewrites changes.jsonl for a resume from the checkpoint of `step`, and returns what this resume changes.

    Lines that no longer hold move to history/. A resume that does the same as the one before keeps its lines.
    """
    before, now = read_changes(run_dir), time.time()
    known = {(each.key, orjson.dumps([each.old, each.new])): each for each in before if each.step == step}
    made = [
        known.get((key, orjson.dumps([old, new])), ChangedKey(step, now, key, old, new))
        for key, old, new in differing(config_at(step, frozen, before), asked)
    ]
    after = [*(each for each in before if each.step < step), *made]
    if after != before:
        if lost := [each for each in before if each not in after]:
            history.keep(CHANGES_FILE, _lines(lost))
        write_durably(run_dir / CHANGES_FILE, _lines(after))
    return made


def _lines(changes: Iterable[ChangedKey]) -> bytes:
    return b"".join(orjson.dumps(dataclasses.asdict(each), option=orjson.OPT_APPEND_NEWLINE) for each in changes)
