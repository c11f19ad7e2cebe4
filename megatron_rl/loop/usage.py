"""What a step used on rank 0: tokens a second, memory, and the share of its GPUs' arithmetic."""

from __future__ import annotations

import numpy as np
import psutil
import torch

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineDtype
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.gpus import Gpu, gpu_of
from megatron_rl.lab.timer import time_of
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.flops import forward_flops


class Usage:
    """Adds up the optimizer steps of a rollout step until `drain`."""

    def __init__(self, arch: Architecture, layout: Layout, device: torch.device, dtype: EngineDtype) -> None:
        self._arch = arch
        self._ranks = layout.world_size // layout.dp  # of one replica
        self._device = device
        self._gpu: Gpu | None = None
        if device.type == "cuda" and dtype == "bf16":
            self._gpu = gpu_of(torch.cuda.get_device_name(device))
        self._flops = 0.0

    def count(self, mini_batch: MiniBatch) -> None:
        """Counts an optimizer step on what this replica trains on, at three times the forward pass."""
        if self._gpu is not None:
            self._flops += 3 * sum(replica_flops(self._arch, each) for each in lengths_of(mini_batch))

    def drain(self, tokens: float, times: dict[str, float]) -> dict[str, float]:
        """Returns the figures of the step, by metric; `tokens`: that it generated or trained on, `times`: its phases'
        seconds, by metric."""
        flops, self._flops = self._flops, 0.0
        figures = {"memory/process": float(psutil.Process().memory_info().rss)}
        if (seconds := sum(times.values())) > 0:
            figures["throughput/tokens_per_second"] = tokens / seconds
        if self._device.type == "cuda":
            figures["memory/gpu"] = float(torch.cuda.max_memory_allocated(self._device))
        if self._gpu is not None and (seconds := times.get(time_of("update"), 0.0)) > 0:
            figures["throughput/mfu"] = flops / (seconds * self._gpu.flops * self._ranks)
        return figures


def lengths_of(mini_batch: MiniBatch) -> list[int]:
    """Returns the length of each sequence, without padding."""
    lengths = []
    for batch in mini_batch.micro_batches:
        lengths += np.bincount(batch.sequence_ids[batch.valid]).tolist()
    return lengths


def replica_flops(arch: Architecture, length: int) -> float:
    """Returns the FLOPs of one sequence's forward pass."""
    return length * forward_flops(arch, length)
