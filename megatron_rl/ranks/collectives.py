"""Exchanges bytes between ranks over gloo, without pickle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_rl.config.sources import ConfigError
from megatron_rl.errors import UserError
from megatron_rl.ranks.world import read_world


def all_gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes, in the order of the group. Collective."""
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
    """Returns the `data` of rank `source` of the group on every rank. Collective."""
    source = dist.get_global_rank(group, source)
    size = torch.tensor([len(data or b"")])
    dist.broadcast(size, source, group=group)
    buffer = torch.empty(max(1, int(size)), dtype=torch.uint8)
    if dist.get_rank() == source and data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, source, group=group)
    return buffer[: int(size)].numpy().tobytes()


def send_bytes(data: bytes, rank: int, group: dist.ProcessGroup) -> None:
    """Sends bytes to a global rank, which calls receive_bytes."""
    dist.send(torch.tensor([len(data)]), rank, group=group)
    dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), rank, group=group)


def receive_bytes(rank: int, group: dist.ProcessGroup) -> bytes:
    """Returns the bytes, at least one, that a global rank sends by send_bytes."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, rank, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, rank, group=group)
    return data.numpy().tobytes()


@contextlib.contextmanager
def together(group: dist.ProcessGroup) -> Iterator[None]:
    """Shares a UserError of the body on one rank with all ranks. The body must contain no collectives.

    Raises the same ConfigError on all ranks; it names each rank and host that failed. A single rank raises its own
    error. Collective.
    """
    mine = ""
    try:
        yield
    except UserError as error:
        if group.size() == 1:
            raise
        mine = str(error)
    named = f"{read_world().me}: {mine}" if mine else ""
    found: dict[str, str] = {}  # by what was found: several ranks may read the same file
    for part in all_gather_bytes(f"{mine}\0{named}".encode(), group):
        what, _, by = part.decode().partition("\0")
        if what:
            found.setdefault(what, by)
    if found:
        raise ConfigError("\n".join(found.values()))
