"""Lets two trainers train in turn: each waits before a step until it is granted, and tells when it has done it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Turns:
    """One trainer's two files: how many steps it may make, and a line for each that it has made."""

    granted_file: Path
    done_file: Path

    @classmethod
    def within(cls, directory: Path) -> Turns:
        return cls(directory / "granted", directory / "done.jsonl")

    def grant(self, steps: int) -> None:
        """Lets the trainer make `steps` steps in all."""
        partial = self.granted_file.with_suffix(".partial")
        partial.write_text(str(steps))
        partial.rename(self.granted_file)

    def done(self) -> list[dict[str, Any]]:
        if not self.done_file.exists():
            return []
        return [json.loads(line) for line in self.done_file.read_text().splitlines(keepends=True) if line[-1] == "\n"]

    def step_done(self, record: dict[str, Any]) -> None:
        """Tells of a step, and waits until the next one is granted."""
        with self.done_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        steps = len(self.done())
        while int(self.granted_file.read_text()) <= steps:
            time.sleep(POLL_SECONDS)
