"""Independent readers of data files, and the comparison with them, for tests of damaged and odd data sets."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import drawing
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.files import DataError
from megatron_rl.data.numbers import Real

Rows = list[dict[str, Any]]


def parquet_rows(path: Path) -> Rows:
    return pq.read_table(path).to_pylist()


def arrow_rows(path: Path) -> Rows:
    data = path.read_bytes()
    return (pa.ipc.open_file(data) if data.startswith(b"ARROW1") else pa.ipc.open_stream(data)).read_all().to_pylist()


def alike(ours: Any, theirs: Any) -> bool:
    """Returns whether values are equal. From JSON `theirs` has Decimals; from a table it has wider types."""
    if isinstance(ours, Real):
        if isinstance(theirs, Decimal):
            return Decimal(ours.text) == theirs
        return "e" not in ours.text and any(np.dtype(width).type(ours) == theirs for width in ("f8", "f4", "f2"))
    if isinstance(theirs, float) and theirs != theirs:  # NaN: a missing number
        return ours is None or ours != ours
    if isinstance(ours, list | dict):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return False
        keys = ours if isinstance(ours, dict) else range(len(ours))
        return all(alike(ours[key], theirs[key]) for key in keys)
    return type(ours) is type(theirs) and ours == theirs


def refusal_names(source: Path, error: DataError) -> bool:
    return str(source) in str(error) and len(str(error)) < 2000


def run(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy) -> None:
    drawing(examples)(given(*strategies)(check))()
