"""Sends changed elements of weights to rollout servers, in a file that both sides see.

Each rank compares its shards with those of the last weight version, before anything is gathered. Rank 0 writes all
ranks' changes into one file, and servers read it by a loader of this project (weights/delta_loader.py). A server that
does not hold the last version gets all weights, by disk.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from torch import Tensor

from megatron_rl.disk import writes
from megatron_rl.engine.export import DESTINATION, holders, model_ranks
from megatron_rl.engine.policy import Policy
from megatron_rl.lab.timer import PREFIX, PhaseTimer
from megatron_rl.models.binding import Slot, bind
from megatron_rl.models.weight import Source, Weight
from megatron_rl.ranks.collectives import all_gather_bytes, receive_bytes, send_bytes
from megatron_rl.rollout.server import LOADER
from megatron_rl.weights.all_servers import Bucket, Sent, WeightSyncError
from megatron_rl.weights.delta_file import Block, as_integers, encode, write_delta
from megatron_rl.weights.directory import DiskRoute


@dataclass(frozen=True)
class Changes:
    """Encoded blocks of changed elements, and how many elements they are of how many."""

    blocks: list[bytes]
    changed: int
    elements: int
    changed_bytes: int


class Published:
    """What this rank holds of the last published version: its shards, on the host. Every rank has one."""

    def __init__(self, policy: Policy) -> None:
        self.version: int | None = None
        self._policy = policy
        self._shards: dict[str, Tensor] = {}

    def remember(self, version: int) -> None:
        """Takes the policy's weights as those of `version`. Call `policy.gather_weights` first."""
        for slot, _, _ in self._mine():
            weight = slot.of(slot.parameter.detach())
            if slot.weight.name not in self._shards:
                self._shards[slot.weight.name] = torch.empty_like(weight, device="cpu")
            self._shards[slot.weight.name].copy_(weight)
        self.version = version

    def changes(self) -> Changes:
        """Returns what differs from the last version. Call `policy.gather_weights` first."""
        blocks, changed, elements, changed_bytes = [], 0, 0, 0
        for slot, number, of in self._mine():
            weight = slot.of(slot.parameter.detach())
            differs = as_integers(weight) != as_integers(self._shards[slot.weight.name].to(weight.device))
            for block in _blocks(slot.weight, weight, differs, number, of):
                blocks.append(encode(block))
                changed += len(block.values)
                changed_bytes += block.values.nbytes
            elements += differs.numel()
            self._policy.moved()
        return Changes(blocks, changed, elements, changed_bytes)

    def _mine(self) -> Iterator[tuple[Slot, int, int]]:
        """Yields the slots whose shards this rank exports, each with the shard's number of how many."""
        policy = self._policy
        rank = policy.place.rank
        for slot in bind(
            list(policy.models), policy.arch, model_ranks(policy.layout, rank), policy.layers.weight_names
        ):
            among = holders(policy.layout, slot.weight, policy.arch)
            if rank in among and not slot.weight.copy:
                yield slot, among.index(rank), len(among)


def _blocks(weight: Weight, shard: Tensor, differs: Tensor, number: int, of: int) -> Iterator[Block]:
    """Yields a block for each tensor that the shard is a part of, also if nothing has changed: a model may wait for a
    tensor that it loads together with another."""
    dim = weight.sharding.dim
    for piece in weight.cut(number, of)[1]:
        source = weight.sources[piece.source]
        mask, values = (tensor.narrow(dim, piece.offset, piece.length) for tensor in (differs, shard))
        offset, strides = _place(source, dim, piece.start, piece.length)
        indices = offset + (mask.nonzero() * torch.tensor(strides, device=mask.device)).sum(1)
        indices, order = indices.sort()
        yield Block(source.name, source.whole.shape, indices.cpu(), values[mask][order].cpu())


def _place(source: Source, dim: int, start: int, length: int) -> tuple[int, tuple[int, ...]]:
    """Returns offset and strides, in the flattened tensor, of a stretch of a source along `dim`."""
    view = source.of(torch.empty(source.whole.shape, device="meta")).narrow(dim, start, length)
    return int(view.storage_offset()), view.stride()


def gather_changes(mine: Changes, policy: Policy) -> Changes | None:
    """Returns all ranks' changes on rank 0, None elsewhere. Collective."""
    place = policy.place
    data = b"".join(mine.blocks)
    told = all_gather_bytes(orjson.dumps([len(data), mine.changed, mine.elements, mine.changed_bytes]), place.control)
    sizes, changed, elements, changed_bytes = zip(*map(orjson.loads, told), strict=True)
    if place.rank != DESTINATION:
        if data:
            send_bytes(data, DESTINATION, place.control)
        return None
    blocks = [data, *(receive_bytes(rank, place.control) for rank, size in enumerate(sizes) if rank and size)]
    return Changes(blocks, sum(changed), sum(elements), sum(changed_bytes))


def _named(file: Path) -> bytes:
    """Returns what the loader gets: a tensor without elements, whose name is the file's path."""
    return pickle.dumps([(str(file), torch.empty(0))])


class DeltaRoute:
    """Sends changed elements through a file. Only the trainer's rank 0 has this object."""

    def __init__(self, whole: DiskRoute) -> None:
        """`whole` sends all weights, to the same servers through the same directory."""
        self._whole = whole

    def push(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Sends all weights. Raises as DiskRoute does, and WeightSyncError if a server lacks the loader."""
        for url, info in zip(self._whole.servers.urls, self._whole.servers.ask("server_info"), strict=True):
            if LOADER not in (info.get("custom_weight_loader") or []):
                raise WeightSyncError(
                    f"weights.route delta: the server at {url} was started without our loader; start it by "
                    f"`megatron-rl serve`, or with --custom-weight-loader {LOADER} if megatron_rl is installed there"
                )
        return self._whole.push(buckets, version)

    def holds(self, version: int | None) -> bool:
        """Tells whether all servers hold this weight version."""
        infos = self._whole.servers.ask("model_info")
        return version is not None and all(info.get("weight_version") == str(version) for info in infos)

    def push_changes(self, changes: Changes, version: int) -> Sent:
        """Brings servers that hold the version before to `version`. Raises WeightSyncError and DiskError."""
        timer = PhaseTimer()
        file = self._whole.directory / f"delta-{version:06d}"
        with timer.phase("write"), writes(f"weight version {version}", file):
            partial = file.with_name(f".{file.name}.partial")
            with partial.open("wb") as opened:
                write_delta(opened, changes.blocks)
                opened.flush()
                os.fsync(opened.fileno())
            partial.rename(file)
            size = file.stat().st_size
        with timer.phase("load"):
            self._whole.servers.ask("abandon_weight_update")
            self._whole.servers.ask("begin_weight_update")
            self._whole.servers.ask("load_custom", loader=LOADER, named_tensors=_named(file), weight_version=version)
            self._whole.servers.ask("end_weight_update")
        file.unlink()  # all servers have read it
        return Sent(size, {name.removeprefix(PREFIX): spent for name, spent in timer.drain().items()})

    def close(self) -> None: ...
