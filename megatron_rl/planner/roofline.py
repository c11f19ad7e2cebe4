"""An estimate of the time of one rollout step's training, from constants of the GPU. No torch.

It is a roofline: each pass takes as long as its arithmetic at a stated share of the peak, or as reading its weights, if
that is longer. What ranks exchange comes on top, as if nothing overlapped. It is good for comparing layouts of one
model, and for an order of magnitude; nothing in it was measured. Sampling and verifiers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import Config
from megatron_rl.config.show import longest_sample, stage_layers
from megatron_rl.gpus import Gpu
from megatron_rl.models.flops import forward_flops, head_flops
from megatron_rl.planner.memory import Job, counted

MFU = 0.35
"""Share of the peak that matrix products reach, attention and small operations included."""
NODE = 8
"""GPUs that NVLink connects."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of all passes and optimizer steps of one rollout step, and the training FLOPs of one token."""

    compute: float  # arithmetic, or reading weights
    exchange: float  # between ranks
    bubble: float  # of the pipeline
    flops: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble


def step_time(job: Job, gpu: Gpu) -> StepTime:
    """Estimates one rollout step, or one optimizer step of SFT, with all samples at their longest."""
    config, layout, arch = job.config, job.layout, job.arch
    forwards, updates, steps = _passes(job)
    shares = [sum(map(len, stage_layers(layout, arch, pp))) / arch.num_layers for pp in range(layout.pp)]
    flops, head = forward_flops(arch, longest_sample(config)[1]), head_flops(arch)
    slowest = max(share * (flops - head) + head * (pp == layout.pp - 1) for pp, share in enumerate(shares))
    weights = counted(job, 0).policy
    arithmetic = job.tokens * slowest / (layout.tp * layout.cp) / (gpu.flops * MFU)
    forward = max(arithmetic, weights.weights / gpu.hbm)
    backward = 3 if config.engine.recomputation.is_whole else 2  # full:N is counted as full
    moved = _exchanged(job, gpu) * arch.num_layers * max(shares)
    passes = forwards + updates * (1 + backward)
    bubbles = (layout.pp - 1) / layout.vpp
    compute, exchange = passes * job.micro_batches * steps * forward, passes * job.micro_batches * steps * moved
    optimizer = (weights.gradients + 2 * weights.optimizer) / gpu.hbm
    reduced = (
        (weights.gradients + weights.weights) / _link(layout.stage_size, gpu) if layout.dp * layout.cp > 1 else 0.0
    )
    return StepTime(
        compute=compute + updates * steps * optimizer,
        exchange=exchange + updates * steps * reduced,
        bubble=bubbles * passes * steps * (forward + moved),
        flops=flops * (1 + backward),
    )


def _passes(job: Job) -> tuple[int, int, int]:
    """Returns forward passes over each sample beside the updates, networks that are updated, and mini-batches."""
    config = job.config
    if not isinstance(config, Config):
        return 0, 1, 1
    has_critic = config.critic is not None
    return (
        config.train.recompute_old_logprobs + job.has_reference + has_critic,
        1 + has_critic,
        config.train.mini_batches,
    )


def _exchanged(job: Job, gpu: Gpu) -> float:
    """Returns the seconds that a layer's forward pass spends on sending one micro-batch: gathers and scatters of tensor
    parallelism, dispatch and combination of experts, and keys and values of context parallelism."""
    layout, arch, item = job.layout, job.arch, job.item
    own = job.tokens / layout.cp / layout.tp
    hidden = own * arch.hidden_size * item
    seconds = 4 * hidden * (layout.tp - 1) / _link(layout.tp, gpu)
    if arch.num_experts:
        ranks = layout.ep * layout.etp
        rows = hidden * arch.experts_per_token * layout.etp * len(arch.moe_layers) / arch.num_layers
        seconds += 2 * rows * (ranks - 1) / ranks / _link(ranks, gpu)
    keys = 2 * max(arch.num_kv_heads / layout.tp, 1) * arch.head_dim * item
    seconds += job.tokens * keys * (layout.cp - 1) / layout.cp / _link(layout.tp * layout.cp, gpu)
    return seconds


def _link(ranks: int, gpu: Gpu) -> float:
    return gpu.nvlink if ranks <= NODE else gpu.network
