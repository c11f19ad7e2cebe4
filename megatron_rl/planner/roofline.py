"""An estimate of the time of one rollout step's training, from constants of the GPU. No torch.

It is a roofline: each pass takes as long as its arithmetic at a stated share of the peak, or as reading its weights, if
that is longer. What ranks exchange comes on top, as if nothing overlapped. It is good for comparing layouts of one
model, and for an order of magnitude; nothing in it was measured. Sampling and verifiers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import Config
from megatron_rl.config.show import longest_sample, stage_layers
from megatron_rl.models.architecture import Architecture
from megatron_rl.planner.memory import Job, counted
from megatron_rl.planner.shares import active_elements

MFU = 0.35
"""Share of the peak that matrix products reach, attention and small operations included."""
NODE = 8
"""GPUs that NVLink connects."""


@dataclass(frozen=True)
class Gpu:
    """Figures of the vendor's data sheet, dense."""

    memory_gib: float  # that a process sees
    flops: float  # bf16, a second
    hbm: float  # bytes a second
    nvlink: float  # bytes a second, one direction
    network: float  # bytes a second of a GPU's own adapter, one direction


GPUS = {
    "a100": Gpu(79, 312e12, 2.0e12, 300e9, 25e9),
    "h100": Gpu(79, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(140, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu(179, 2250e12, 8.0e12, 900e9, 50e9),
}


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


def forward_flops(arch: Architecture, length: int) -> float:
    """Returns the mean FLOPs of a token's forward pass in a sequence of `length` tokens: two for each element of the
    matrices that it meets, and those of attention over the tokens before it."""
    widths = 2 * arch.head_dim
    if arch.latent is not None:
        widths = arch.latent.nope_dim + arch.latent.rope_dim + arch.latent.value_dim
    attended = 0.0
    for layer in range(arch.num_layers):
        if not arch.has_delta_net(layer):
            attended += min(length / 2, arch.window_of(layer) or length)
    return 2 * active_elements(arch) + 2 * attended * arch.num_heads * widths + _head_flops(arch)


def _head_flops(arch: Architecture) -> float:
    return 2 * arch.hidden_size * (1 if arch.value_head else arch.vocab_size)


def step_time(job: Job, gpu: Gpu) -> StepTime:
    """Estimates one rollout step, or one optimizer step of SFT, with all samples at their longest."""
    config, layout, arch = job.config, job.layout, job.arch
    forwards, updates, steps = _passes(job)
    shares = [sum(map(len, stage_layers(layout, arch, pp))) / arch.num_layers for pp in range(layout.pp)]
    flops, head = forward_flops(arch, longest_sample(config)[1]), _head_flops(arch)
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
