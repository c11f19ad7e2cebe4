"""A file of the weights' elements that changed since another version.

A block has the changed elements of one tensor that one rank holds: a line of JSON, the elements' places and their new
values. Both are made of symbols whose frequencies differ, and deflated by Huffman's code alone. Imported by servers, so
it needs nothing of the trainer.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By bytes of an element."""


class DeltaError(ValueError):
    """A file is not a delta, or is damaged."""


@dataclass(frozen=True)
class Block:
    """Changed elements of one tensor; none, if nothing of what the rank holds has changed."""

    name: str
    shape: tuple[int, ...]
    indices: Tensor
    """[N] int64, ascending: places in the flattened tensor."""
    values: Tensor
    """[N], of 2 or 4 bytes each."""


def encode(block: Block) -> bytes:
    count = len(block.indices)
    # One byte for each distance, or two if most would not fit.
    width = 1 if math.prod(block.shape) < 300 * count else 2
    places = _deflate(_to_distances(block.indices.numpy(), width))
    values = _deflate(_sign_last(as_integers(block.values).numpy().view(f"<u{block.values.dtype.itemsize}")))
    about = {
        "name": block.name,
        "shape": block.shape,
        "dtype": str(block.values.dtype).removeprefix("torch."),
        "count": count,
        "width": width,
        "sizes": [len(places), len(values)],
    }
    return json.dumps(about).encode() + b"\n" + places + values


def write_delta(file: BinaryIO, blocks: Sequence[bytes]) -> None:
    """`blocks` are encoded ones; each item may be several, one after the other."""
    file.write(json.dumps({"format": FORMAT, "bytes": sum(map(len, blocks))}).encode() + b"\n")
    file.writelines(blocks)


def read_blocks(path: Path) -> Iterator[Block]:
    """Yields the file's blocks. Raises DeltaError."""
    with path.open("rb") as file:
        try:
            head = json.loads(file.readline())
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}; expected {FORMAT}: update trainer or server")
            if (size := path.stat().st_size) != (end := file.tell() + head["bytes"]):
                raise ValueError(f"{size} bytes; expected {end}")
            while file.tell() < end:
                about = json.loads(file.readline())
                places, values = (zlib.decompress(file.read(size)) for size in about["sizes"])
                yield _decode(about, places, values)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise DeltaError(f"{path}: no whole file of changed weights: {error}") from error


def _decode(about: dict[str, Any], places: bytes, values: bytes) -> Block:
    dtype = getattr(torch, about["dtype"])
    bits = _sign_first(_from_planes(values, np.dtype(f"<u{dtype.itemsize}")))
    distances = _from_planes(places, np.dtype(f"<u{about['width']}"))
    indices = torch.from_numpy(_from_distances(distances, about["count"]))
    changed = torch.from_numpy(bits.view(f"<i{dtype.itemsize}")).view(dtype)
    if len(indices) != len(changed):
        raise ValueError(f"{about['name']}: {len(indices)} places and {len(changed)} values")
    return Block(about["name"], tuple(about["shape"]), indices, changed)


def _to_distances(indices: np.ndarray, width: int) -> np.ndarray:
    """Returns how many unchanged elements precede each changed one. The largest symbol stands for as many, and for no
    element."""
    largest = 256**width - 1
    free = np.diff(indices, prepend=-1) - 1
    ends = np.cumsum(free // largest + 1) - 1
    symbols = np.full(ends[-1] + 1 if len(ends) else 0, largest, f"<u{width}")
    symbols[ends] = free % largest
    return symbols


def _from_distances(symbols: np.ndarray, count: int) -> np.ndarray:
    places = np.cumsum(symbols, dtype=np.int64)[symbols != np.iinfo(symbols.dtype).max]
    if len(places) != count:
        raise ValueError(f"{len(places)} places; expected {count}")
    return places + np.arange(count)


def as_integers(values: Tensor) -> Tensor:
    """Returns the elements' bits. Elements are equal only if these are."""
    return values.contiguous().view(_INTEGERS[values.dtype.itemsize])


def _sign_last(bits: np.ndarray) -> np.ndarray:
    """Moves the sign behind the mantissa: then the upper byte is the exponent, of which there are few."""
    return (bits << 1) | (bits >> (bits.itemsize * 8 - 1))


def _sign_first(bits: np.ndarray) -> np.ndarray:
    return (bits >> 1) | (bits << (bits.itemsize * 8 - 1))


def _from_planes(data: bytes, dtype: np.dtype) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype)[:, 0]


def _deflate(numbers: np.ndarray) -> bytes:
    """Packs all numbers' first bytes, then all second bytes, and so on, each with codes of its own."""
    packer = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    packed = [packer.compress(plane.tobytes()) + packer.flush(zlib.Z_SYNC_FLUSH) for plane in planes]
    return b"".join([*packed, packer.flush()])
