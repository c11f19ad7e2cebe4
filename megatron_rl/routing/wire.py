"""Decodes and checks the routes in a server's answer, SGLang's `routed_experts`. Pure functions.

SGLang 0.5.23 (by its source and by live servers) sends base64 of little-endian int32, in C order
[rows, all transformer layers, top_k]. It keeps the ids in a host buffer, one line per slot of the KV cache, and gathers
the slots of a request at its end: rows = prompt + completion - 1. An aborted request that had begun has these rows too.
A request that is aborted while it waits lacks the field.

- A prefix-cache hit has all its rows, from the request that computed the prefix.
- A line that was never written is zeros in every layer. That is the only sign of a missing route, and with top-1
  routing it looks like expert 0. Layers without experts always have zeros.
- KV from elsewhere (a hierarchical cache, another server's prefill) has no ids; the line then keeps the slot's earlier
  ids. Nothing shows this, so config.load refuses such servers.
- The ids are logical: they are recorded before redundant and moved experts are numbered. This is untested here, so
  config.load refuses the flags for such experts too.
- After a retraction the rows are computed and recorded again, under the weights at that time.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_rl.data.trace import MISSING, RoutingTrace, TraceError
from megatron_rl.data.versions import VersionSpan
from megatron_rl.models.architecture import Architecture

SERVER_FLAG = "--enable-return-routed-experts"


@dataclass(frozen=True)
class RouteSpec:
    """The form that a server's routes must have for this model."""

    num_layers: int  # with and without experts
    moe_layers: tuple[int, ...]
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, arch: Architecture) -> Self:
        layers = arch.moe_layers
        return cls(arch.num_layers, layers, arch.experts_per_token, arch.num_experts)

    def check(self, trace: RoutingTrace) -> None:
        """Raises TraceError if the trace is from another model's routers."""
        found = (trace.layers, trace.top_k, trace.num_experts)
        expected = (self.moe_layers, self.top_k, self.num_experts)
        for name, one, other in zip(("layers", "top_k", "num_experts"), found, expected, strict=True):
            if one != other:
                raise TraceError(f"{name}: found {one}; expected {other}, as the model has")


def read_routes(
    encoded: str, spec: RouteSpec, *, prompt: int, versions: Sequence[VersionSpan], retracted: bool
) -> RoutingTrace:
    """The trace of `prompt` tokens and of the completion, whose `versions` are at least one span. Raises TraceError.

    A row is the forward pass from which the next token was sampled, so it has that token's version. The prompt's rows
    have the version of the first token. If a request was `retracted`, only rows of its last version are known to be the
    routes that were used; earlier rows may have been computed again since.
    """
    rows = prompt + versions[-1].end - 1
    spans = [VersionSpan(v.version, prompt - 1 + v.start, prompt - 1 + v.end) for v in versions]
    spans[0] = VersionSpan(spans[0].version, 0, spans[0].end)
    ids = np.take(_decode(encoded, (rows, spec.num_layers, spec.top_k)), spec.moe_layers, axis=1)
    if spec.top_k > 1:
        unwritten = ~ids.any(axis=(1, 2))
        if unwritten.all():
            # Some of SGLang's expert kernels choose the experts themselves, after the ids were recorded.
            raise TraceError(f"found no route in any of {rows} rows; expected some: the server's experts record none")
        ids[unwritten] = MISSING
    if retracted:
        ids[: spans[-1].start] = MISSING
    return RoutingTrace.from_ids(
        ids, layers=spec.moe_layers, num_experts=spec.num_experts, source="rollout", versions=spans
    )


def _decode(encoded: str, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError as error:  # binascii.Error, or not ASCII
        raise TraceError(f"found {encoded!r:.40}; expected base64 ({error})") from None
    size = int(np.prod(shape)) * 4
    if len(data) != size:
        raise TraceError(f"found {len(data)} bytes; expected {size}: int32 {list(shape)} (rows, layers, top_k)")
    return np.frombuffer(data, dtype="<i4").reshape(shape)
