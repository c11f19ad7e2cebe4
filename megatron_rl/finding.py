"""What a check of something outside the program has found, as a line of the commands that print such checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "fail", "unknown", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `unknown`: it cannot be told; `skipped`: it needs what has failed."""

    state: State
    check: str
    text: str

    def __str__(self) -> str:
        text = " ".join(self.text.split()).removeprefix(f"{self.check}: ")
        return f"  {self.state:<8} {self.check}: {text}"
