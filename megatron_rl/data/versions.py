"""The weight versions that generated a sample's tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a sample were generated under this weight version."""

    version: int
    start: int
    end: int
