"""Hands weights to servers in memory that they share with the trainer (weights.route ipc).

A server's rank reads a bucket where the trainer's rank on its GPU holds it: by CUDA IPC on a GPU, in shared memory on a
CPU. Only handles travel by HTTP. Every trainer rank gets each bucket, because a server's rank cuts its shard itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import orjson
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from megatron_rl.lab.timer import PREFIX, PhaseTimer
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.ranks.place import Place
from megatron_rl.weights.all_servers import AllServers, Bucket, Sent
from megatron_rl.weights.collective import as_bytes


class SharedRoute:
    """Every rank has one. Each server has the GPUs of as many ranks as it has ranks."""

    def __init__(self, servers: AllServers | None, places: Sequence[str], place: Place, device: torch.device) -> None:
        """`servers`: rank 0's. `places`: all that were started, by URL, in the order of their GPUs."""
        self._servers = servers
        self._places = places
        self._place = place
        self._device = device

    def push(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Loads the buckets into all servers as weight version `version`. Raises WeightSyncError, on every rank.
        Collective."""
        timer, total, iterator = PhaseTimer(), 0, iter(buckets)
        sizes = self._begin()
        while True:
            with timer.phase("gather"):
                bucket = next(iterator, None)
            if bucket is None:
                break
            with timer.phase("broadcast"):
                described = broadcast_bytes(describe(bucket) if bucket else None, self._place.control)
                flat = self._on_every_rank(bucket, described)
                payloads = all_gather_bytes(payload(flat, described), self._place.control)
            with timer.phase("load"):
                self._load(payloads, sizes)
            total += flat.nbytes
            del bucket, flat  # only now: the servers have read it
        with together(self._place.control):
            if self._servers is not None:
                self._servers.ask("end_weight_update")
                self._servers.ask("update_weight_version", version=version)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()
        return Sent(total, {name.removeprefix(PREFIX): spent for name, spent in timer.drain().items()})

    def close(self) -> None: ...

    def _begin(self) -> list[int]:
        """Returns the number of each server's ranks, on rank 0."""
        sizes: list[int] = []
        with together(self._place.control):
            if self._servers is not None:
                sizes = [info["tp_size"] for info in self._servers.ask("server_info")]
                self._servers.ask("abandon_weight_update")
                self._servers.ask("begin_weight_update")
        return sizes

    def _on_every_rank(self, bucket: Bucket, described: bytes) -> Tensor:
        """Returns the bucket's bytes in memory of this rank's device."""
        size = _layout(described)[-1].end_idx
        flat = as_bytes(bucket) if bucket else torch.empty(size, dtype=torch.uint8, device=self._device)
        dist.broadcast(flat, src=0)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the servers' streams do not wait for NCCL's
        return flat

    def _load(self, payloads: list[bytes], sizes: list[int]) -> None:
        with together(self._place.control):
            if self._servers is not None:
                first = (self._places.index(url) * size for url, size in zip(self._servers.urls, sizes, strict=True))
                own = [{"payloads": payloads[at : at + size]} for at, size in zip(first, sizes, strict=True)]
                self._servers.wait(self._servers.start_each("update_weights_from_tensor", own))


def describe(bucket: Bucket) -> bytes:
    """Returns names, dtypes and shapes of a bucket's tensors."""
    return orjson.dumps([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket])


def payload(flat: Tensor, described: bytes) -> bytes:
    """Returns a flattened bucket as SGLang's MultiprocessingSerializer unpickles it. `flat` must live, unchanged, until
    it is read."""
    with _by_name():
        return bytes(ForkingPickler.dumps({"flattened_tensor": flat, "metadata": _layout(described)}))


def _layout(described: bytes) -> list[Any]:
    """Returns what SGLang reads of its FlattenedTensorMetadata: its unpickler refuses classes that are not listed."""
    found, start = [], 0
    for name, dtype_name, shape in orjson.loads(described):
        dtype = getattr(torch, dtype_name)
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(
            SimpleNamespace(
                name=name, shape=torch.Size(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    return found


@contextlib.contextmanager
def _by_name() -> Iterator[None]:
    """Shares a CPU's memory by the name of a file. By default torch would wait for the reader to ask for a file
    descriptor, with a secret that the server lacks."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
