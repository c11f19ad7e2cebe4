"""Sends weights to rollout servers through a directory that both sides see."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.disk import writes
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, save_weights
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.collective import wait_for


class DiskRoute:
    """Sends weights through files. Only the trainer's rank 0 has this object.

    It keeps the newest two versions, because a server may still read the previous one.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        loop: BackgroundLoop,
        directory: Path,
        source_dir: Path,
        dtype: torch.dtype,
        timeout_seconds: float,
    ) -> None:
        self._clients = clients
        self._loop = loop
        self._directory = directory.resolve()
        self._source_dir = source_dir
        self._dtype = dtype
        self._timeout = timeout_seconds

    def push(self, buckets: Iterable[list[tuple[str, Tensor]]], version: int) -> int:
        """Writes the buckets as weight version `version` and has all servers load it; returns the bytes written.

        Raises WeightSyncError if a server refuses them or does not answer in time, and DiskError if a file cannot be
        written.
        """
        target = self._directory / f"version-{version:06d}"
        tensors = (pair for bucket in buckets for pair in bucket)
        with writes(f"weight version {version}", target):
            shutil.rmtree(target, ignore_errors=True)  # left by the run before it was resumed
            self._directory.mkdir(parents=True, exist_ok=True)
            save_weights(tensors, target, self._source_dir, MAX_SHARD_BYTES, self._dtype)
        answers = [
            self._loop.start(client.update_weights_from_disk(str(target), weight_version=version))
            for client in self._clients
        ]
        wait_for(answers, self._timeout, [client.url for client in self._clients])
        # Sort by number, and skip later versions: a run that was resumed from an older step writes them again.
        kept = {f"version-{number:06d}" for number in (version - 1, version)}
        for other in self._directory.glob("version-*"):
            if other.name not in kept:
                shutil.rmtree(other, ignore_errors=True)  # the sync is done; the next sync tries again
        return sum(file.stat().st_size for file in target.glob("*.safetensors"))

    def close(self) -> None: ...
