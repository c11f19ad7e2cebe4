"""The experts that each token visited: recorded where tokens were routed, checked once, replayed elsewhere.

Plain NumPy, no torch. Row t is the forward pass of token t. A rollout engine runs no forward pass for the last token
that it samples, so a sample of n tokens has n - 1 rows. No row is invented for the last token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_rl.data.versions import VersionSpan, first_spans
from megatron_rl.errors import UserError

FORMAT = 1
MISSING = -1
"""In ids from outside, stands for every expert of a row whose route is unknown."""

Source = Literal["rollout", "trainer"]
Bools = npt.NDArray[np.bool_]


class TraceError(UserError, ValueError):
    """Expert ids do not form a routing trace. Names the row, the layer, what was found and what was expected."""


_Number = Annotated[int, Field(ge=0, le=2**53)]


class _Header(BaseModel):
    """The part of to_bytes that is not an array."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: _Number
    checksum: str
    layers: tuple[_Number, ...]
    num_experts: _Number
    source: Source
    shape: tuple[_Number, _Number, _Number]
    versions: tuple[tuple[_Number, _Number, _Number], ...]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts that the tokens of one sample went to.

    experts [rows, layers, top_k] is uint8 up to 256 experts, else uint16; zeros in rows that are not present.
    present [rows] is False for a row whose route is unknown. Such a row routes live, and is counted.

    Raises TraceError if shapes, dtypes, layers or versions do not fit together; `from_ids` also checks the ids.
    """

    layers: tuple[int, ...]  # global 0-based numbers of the MoE layers, ascending
    num_experts: int
    source: Source
    experts: npt.NDArray[np.unsignedinteger]
    present: Bools
    versions: tuple[VersionSpan, ...]  # weight versions under which the rows were routed

    def __post_init__(self) -> None:
        dtype, shape = experts_dtype(self.num_experts), self.experts.shape
        if self.experts.dtype != dtype or len(shape) != 3 or shape[1] != len(self.layers):
            raise TraceError(
                f"experts: found {self.experts.dtype} {list(shape)}; "
                f"expected {dtype} [rows, {len(self.layers)} layers, top_k]"
            )
        if self.present.dtype != np.bool_ or self.present.shape != shape[:1]:
            raise TraceError(
                f"present: found {self.present.dtype} {list(self.present.shape)}; expected bool [{shape[0]}]"
            )
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise TraceError(f"layers: found {list(self.layers)}; expected different numbers from 0, ascending")
        ends = [0, *(span.end for span in self.versions)]
        if ends[-1] != shape[0] or any(s.start != e or s.end < e for s, e in zip(self.versions, ends, strict=False)):
            spans = [(span.start, span.end) for span in self.versions]
            raise TraceError(
                f"versions: found spans {spans}; expected them to follow on one another over {shape[0]} rows"
            )

    @classmethod
    def from_ids(
        cls,
        ids: npt.NDArray[np.integer],
        *,
        layers: Sequence[int],
        num_experts: int,
        source: Source,
        versions: Sequence[VersionSpan],
    ) -> RoutingTrace:
        """A trace from ids [rows, layers, top_k] of any integer dtype. A row of -1 alone has an unknown route.

        Raises TraceError if an id is out of range, an expert occurs twice in a row and layer, or a row is partly -1.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ids.ndim != 3:
            raise TraceError(f"ids: found {ids.dtype} {list(ids.shape)}; expected integers [rows, layers, top_k]")
        if ids.shape[1] != len(layers):
            raise TraceError(f"ids: found {ids.shape[1]} layers; expected {len(layers)}: {list(layers)}")
        lowest = int(ids.min(initial=0))
        if lowest < MISSING or int(ids.max(initial=0)) >= num_experts:
            outside = (ids < MISSING) | (ids >= num_experts)
            _refuse(ids, np.any(outside, axis=-1), layers, f"ids in [0, {num_experts})")
        present = np.ones(len(ids), dtype=np.bool_)
        if lowest == MISSING:
            missing = ids == MISSING
            present = ~missing.all(axis=(1, 2))
            partial = missing.any(-1) & present[:, None]
            if partial.any():
                _refuse(ids, partial, layers, f"{MISSING} in all layers of a row or in none")
            ids = np.where(present[:, None, None], ids, 0)
        experts = np.ascontiguousarray(ids, dtype=experts_dtype(num_experts))
        twice = _twice(experts) & present[:, None]
        if twice.any():
            _refuse(ids, twice, layers, f"{ids.shape[2]} different experts")
        return cls(tuple(layers), num_experts, source, experts, present, tuple(versions))

    @property
    def rows(self) -> int:
        return len(self.experts)

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def checksum(self) -> str:
        """Digest of the whole trace; equal on every machine."""
        digest = hashlib.blake2b(orjson.dumps(self._header()), digest_size=16)
        digest.update(np.ascontiguousarray(self.experts, dtype=self.experts.dtype.newbyteorder("<")).tobytes())
        digest.update(np.ascontiguousarray(self.present).tobytes())
        return digest.hexdigest()

    def append(self, other: RoutingTrace) -> RoutingTrace:
        """A trace with the rows of `other` appended. Raises TraceError if routers or sources differ."""
        for name in ("layers", "num_experts", "source", "top_k"):
            found, expected = getattr(other, name), getattr(self, name)
            if found != expected:
                raise TraceError(f"{name}: found {found!r} in the rows to append; expected {expected!r}")
        moved = (VersionSpan(v.version, v.start + self.rows, v.end + self.rows) for v in other.versions)
        return dataclasses.replace(
            self,
            experts=np.concatenate([self.experts, other.experts]),
            present=np.concatenate([self.present, other.present]),
            versions=_merged((*self.versions, *moved)),
        )

    def head(self, rows: int) -> RoutingTrace:
        """The first `rows` rows."""
        return dataclasses.replace(
            self, experts=self.experts[:rows], present=self.present[:rows], versions=first_spans(self.versions, rows)
        )

    def tail(self, start: int) -> RoutingTrace:
        """The rows from `start` on."""
        spans = (VersionSpan(v.version, max(v.start - start, 0), v.end - start) for v in self.versions if v.end > start)
        return dataclasses.replace(
            self, experts=self.experts[start:], present=self.present[start:], versions=tuple(spans)
        )

    def append_missing(self, rows: int, version: int) -> RoutingTrace:
        """A trace with unknown rows appended: tokens whose forward pass under `version` was not recorded."""
        missing = np.zeros((rows, len(self.layers), self.top_k), dtype=self.experts.dtype)
        absent = np.zeros(rows, dtype=np.bool_)
        spans = (VersionSpan(version, 0, rows),)
        return self.append(dataclasses.replace(self, experts=missing, present=absent, versions=spans))

    def to_bytes(self) -> bytes:
        """Safetensors bytes. The fields that are not arrays are JSON in an array of their own."""
        header = {"format": FORMAT, "checksum": self.checksum, **self._header()}
        return safetensors.numpy.save(
            {
                "header": np.frombuffer(orjson.dumps(header), dtype=np.uint8),
                "experts": np.ascontiguousarray(self.experts),
                "present": np.ascontiguousarray(self.present),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> RoutingTrace:
        """Reads the bytes of `to_bytes` into read-only arrays. Raises TraceError for any other bytes."""
        try:
            arrays = safetensors.numpy.load(data)
            header = _Header.model_validate_json(arrays["header"].tobytes())
            experts, present = arrays["experts"], arrays["present"]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, ("header", *first["loc"])))
            raise TraceError(f"found bytes that are no routing trace: {field}: {first['msg']}") from None
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TraceError(f"found {len(data)} bytes that are no routing trace ({error!r:.200})") from None
        if header.format != FORMAT:
            raise TraceError(f"found a trace of format {header.format}; expected {FORMAT}")
        versions = tuple(VersionSpan(*span) for span in header.versions)
        trace = cls(header.layers, header.num_experts, header.source, experts, present, versions)
        if trace.checksum != header.checksum:
            raise TraceError(
                f"the routing trace is damaged: found checksum {trace.checksum}; expected {header.checksum}"
            )
        outside = (experts >= header.num_experts).any(axis=-1)
        if outside.any():
            _refuse(experts, outside, header.layers, f"ids in [0, {header.num_experts})")
        return trace

    def _header(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "num_experts": self.num_experts,
            "source": self.source,
            "shape": self.experts.shape,
            "versions": [[v.version, v.start, v.end] for v in self.versions],
        }


def experts_dtype(num_experts: int) -> np.dtype[np.unsignedinteger]:
    if not 0 < num_experts <= 1 << 16:
        raise TraceError(f"num_experts: found {num_experts}; expected 1 to {1 << 16}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def _twice(experts: npt.NDArray[np.unsignedinteger]) -> Bools:
    """[rows, layers]: whether an expert is named twice. It is ten times as fast as sorting the short rows."""
    columns = np.ascontiguousarray(np.moveaxis(experts, -1, 0))
    found = np.zeros(columns.shape[1:], dtype=np.bool_)
    for a, b in itertools.combinations(columns, 2):
        found |= a == b
    return found


def _refuse(ids: npt.NDArray[np.integer], bad: Bools, layers: Sequence[int], expected: str) -> None:
    row, column = (int(index) for index in np.argwhere(bad)[0])
    raise TraceError(
        f"row {row}, layer {layers[column]}: found experts {ids[row, column].tolist()}; expected {expected}"
    )


def _merged(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Merges neighbouring spans of the same version."""
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            span = VersionSpan(span.version, merged.pop().start, span.end)
        merged.append(span)
    return tuple(merged)
