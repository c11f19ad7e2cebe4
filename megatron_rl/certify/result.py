"""The task of the ranks, and their results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CertificateSpec:
    """The task of the ranks, handed over as JSON."""

    model: str
    layouts: list[str]
    recompute: list[str]
    dtype: str
    device: str


@dataclass(frozen=True)
class CertificateResult:
    layout: str
    recompute: str
    dtype: str
    replayed_rows: int  # rows (sample, position, layer) that used exactly their own trace in the forward pass
    live_rows: int  # rows without a route, which routed live; padding not counted
    recomputed_rows: int  # rows that used their trace again in the backward pass
    trace_bytes: int  # on the rank that holds most
    problems: list[str]  # empty if everything is proven
    caught: dict[str, bool]  # by negative case

    @property
    def passed(self) -> bool:
        return not self.problems and all(self.caught.values())
