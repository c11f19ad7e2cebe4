"""Sends weights to rollout servers through a directory that both sides see."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_rl.disk import writes
from megatron_rl.lab.timer import PREFIX, PhaseTimer
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, save_weights
from megatron_rl.weights.all_servers import AllServers, Bucket, Sent


class DiskRoute:
    """Sends weights through files. Only the trainer's rank 0 has this object.

    It keeps the newest two versions, because a server may still read the previous one.
    """

    def __init__(self, servers: AllServers, directory: Path, source_dir: Path, dtype: torch.dtype) -> None:
        self.servers = servers
        self.directory = directory.resolve()
        self._source_dir = source_dir
        self._dtype = dtype

    def push(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Writes the buckets as weight version `version` and has all servers load it.

        Raises WeightSyncError if a server refuses them or does not answer in time, and DiskError if a file cannot be
        written.
        """
        timer = PhaseTimer()
        target = self.directory / f"version-{version:06d}"
        tensors = (pair for bucket in buckets for pair in bucket)
        with timer.phase("write"), writes(f"weight version {version}", target):
            shutil.rmtree(target, ignore_errors=True)  # left by the run before it was resumed
            self.directory.mkdir(parents=True, exist_ok=True)
            save_weights(tensors, target, self._source_dir, MAX_SHARD_BYTES, self._dtype)
        with timer.phase("load"):
            self.servers.ask("update_weights_from_disk", model_path=str(target), weight_version=version)
        # Sort by number, and skip later versions: a run that was resumed from an older step writes them again.
        kept = {f"version-{number:06d}" for number in (version - 1, version)}
        for other in self.directory.glob("version-*"):
            if other.name not in kept:
                shutil.rmtree(other, ignore_errors=True)  # the sync is done; the next sync tries again
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        return Sent(size, {name.removeprefix(PREFIX): spent for name, spent in timer.drain().items()})

    def close(self) -> None: ...
