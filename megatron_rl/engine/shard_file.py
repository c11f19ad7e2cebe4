"""One rank's file of a checkpoint: safetensors, digested as it is written. Nothing in it is ever unpickled."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], moved: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Writes 1-D tensors and a JSON object; returns the file's name, bytes and sha256 once all is on the disk. `moved`
    is called after each tensor.

    Raises OSError, and TypeError for a dtype other than fp32, bf16 and uint8.
    """
    header: dict[str, Any] = {"__metadata__": {"state": orjson.dumps(state).decode()}}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}")
        end = at + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [at, end]}
        at = end
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        written = 0
        beginning = len(head).to_bytes(8, "little") + head
        for data in itertools.chain([memoryview(beginning)], map(_bytes, tensors.values())):
            digest.update(data)
            written += _write(file, data)
            moved()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": written, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _write(file: Any, data: memoryview) -> int:
    start = 0
    while start < len(data):
        start += file.write(data[start:])
    return start


class ShardReader:
    """The tensors of one rank's file, whose digest has been found right."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.names = frozenset(self._file.keys())
        self.state: dict[str, Any] = orjson.loads(self._file.metadata()["state"])

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def stretch(self, name: str, start: int, length: int) -> Tensor:
        """Returns positions [start, start + length) of a 1-D tensor."""
        stretch: Tensor = self._file.get_slice(name)[start : start + length]
        return stretch
