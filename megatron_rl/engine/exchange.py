"""Bytes between ranks over gloo, without pickle."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes, in group order."""
    mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = max(1, *(int(size) for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(everyone, padded, group=group)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(everyone, sizes, strict=True)]


def broadcast_bytes(data: bytes | None, group: dist.ProcessGroup, source: int = 0) -> bytes:
    """The bytes of the group's rank number `source`; `data` is ignored elsewhere."""
    source = dist.get_global_rank(group, source)
    size = torch.tensor([len(data or b"")])
    dist.broadcast(size, source, group=group)
    buffer = torch.empty(max(1, int(size)), dtype=torch.uint8)
    if dist.get_rank() == source and data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, source, group=group)
    return buffer[: int(size)].numpy().tobytes()
