"""What the ranks are told, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CertificateSpec:
    """What the ranks are told, as JSON."""

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
    replayed_rows: int  # (sample, position, layer) that used exactly their own trace, in the forward pass
    live_rows: int  # without a route, padding apart; they routed live
    recomputed_rows: int  # that used their trace again in the backward pass
    trace_bytes: int  # the most that a rank holds
    problems: list[str]  # empty if all is proven
    caught: dict[str, bool]  # negative cases

    @property
    def passed(self) -> bool:
        return not self.problems and all(self.caught.values())
