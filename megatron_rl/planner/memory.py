"""The memory of each rank that differs from others, by kind. No torch, unless the counts come from pretended.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from megatron_rl.config.layout import Coordinates, Layout
from megatron_rl.config.optim import memory_settings
from megatron_rl.config.schema import Config, CriticOptimConfig, OptimConfig, SftConfig
from megatron_rl.config.sharing import served_bytes
from megatron_rl.config.show import longest_sample, stage_layers
from megatron_rl.config.switches import NoKL
from megatron_rl.models.architecture import Architecture
from megatron_rl.planner.activations import FP32, IMBALANCE, Workload, logits_bytes, stage_activations
from megatron_rl.planner.shares import NetworkBytes, largest_tensor, multiplied_elements, network_bytes

GIB = 1 << 30
MIB = 1 << 20
RESERVE = 3 * GIB
"""Memory of a GPU that no tensor of ours has: CUDA's context, libraries' workspaces, and NCCL's buffers."""
PASSING = ("activations", "layer", "logits", "bucket", "step")
"""Kinds that do not exist all at once; see RankMemory.peak."""


@dataclass(frozen=True)
class Job:
    """A run on a layout: what decides its memory and its time."""

    config: Config | SftConfig
    arch: Architecture
    layout: Layout

    @property
    def item(self) -> int:
        """Bytes of a weight's and an activation's element."""
        return FP32 if self.config.engine.dtype == "fp32" else 2

    @property
    def has_reference(self) -> bool:
        return isinstance(self.config, Config) and not isinstance(self.config.objective.kl, NoKL)

    @property
    def critic_optim(self) -> CriticOptimConfig | None:
        has = isinstance(self.config, Config) and self.config.critic is not None
        return self.config.critic.optim if has else None  # type: ignore[union-attr]

    @property
    def per_replica(self) -> int:
        """Samples of a mini-batch on each data-parallel replica; of some, one fewer."""
        return math.ceil(longest_sample(self.config)[0] / self.layout.dp)

    @property
    def per_micro_batch(self) -> int:
        """Samples of a micro-batch at their longest."""
        return min(
            max(self.config.engine.max_tokens_per_micro_batch // longest_sample(self.config)[1], 1), self.per_replica
        )

    @property
    def tokens(self) -> int:
        """Packed tokens of the largest micro-batch, over all context-parallel ranks; a sample is never cut."""
        longest = longest_sample(self.config)[1]
        budget = max(self.config.engine.max_tokens_per_micro_batch, longest)
        return min(budget, self.per_replica * longest)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a mini-batch on each replica if all samples are as long as allowed."""
        multiple = self.layout.micro_batch_multiple
        return math.ceil(math.ceil(self.per_replica / self.per_micro_batch) / multiple) * multiple


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by kind."""

    rank: int
    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    critic: int  # its weights, gradients and optimizer
    fp8: int  # copies of weights
    activations: int  # kept for the backward pass, of all micro-batches in flight
    layer: int  # on top of these while one layer's backward pass runs
    logits: int  # or while the last stage computes log-probs and their gradients
    bucket: int  # of the weights that are exported
    step: int  # temporaries of Adam
    reserve: int
    host: int  # of the host's memory, for optimizers
    served: int  # a server's weights, beside those of the policy while it gets them (rollout.servers.colocate)

    @property
    def static(self) -> int:
        own = self.weights + self.gradients + self.optimizer
        return own + self.reference + self.critic + self.fp8 + self.reserve

    @property
    def peak(self) -> int:
        """The largest of forward and backward pass, optimizer step, and weight sync."""
        return max(self.activations + max(self.layer, self.logits), self.step, self.bucket)

    @property
    def sync(self) -> int:
        """What there is in a weight sync under rollout.servers.colocate, in which all else is moved to the host."""
        return self.reserve + self.weights + self.bucket + self.served

    @property
    def total(self) -> int:
        return max(self.static + self.peak, self.sync)


@dataclass(frozen=True)
class RankNetworks:
    """The networks of one rank."""

    policy: NetworkBytes
    critic: NetworkBytes | None
    reference: NetworkBytes | None


Measure = Callable[[Job, int], RankNetworks]
"""(job, rank) -> the networks of that rank."""


def counted(job: Job, rank: int) -> RankNetworks:
    """Counts the rank's networks in the list of weights."""
    at = job.layout.coordinates(rank)
    critic = None
    if (optim := job.critic_optim) is not None:
        critic = _counted(dataclasses.replace(job.arch, value_head=True), job, at, optim)
    reference = network_bytes(job.arch, job.layout, at, job.item) if job.has_reference else None
    return RankNetworks(_counted(job.arch, job, at, job.config.optim), critic, reference)


def _counted(arch: Architecture, job: Job, at: Coordinates, optim: OptimConfig) -> NetworkBytes:
    gradient = FP32 if job.config.engine.grad_dtype == "fp32" else 2
    return network_bytes(arch, job.layout, at, job.item, gradient=gradient, optim=optim)


def differing_ranks(layout: Layout, arch: Architecture) -> list[int]:
    """Returns the first rank of the first stage, of the deepest stage between, and of the last. Ranks of one stage hold
    equal shares."""
    middle = range(1, layout.pp - 1)
    deepest = max(middle, key=lambda pp: sum(map(len, stage_layers(layout, arch, pp))), default=0)
    return [pp * layout.stage_size for pp in sorted({0, deepest, layout.pp - 1})]


def rank_memory(job: Job, rank: int, measure: Measure = counted) -> RankMemory:
    config, layout, arch = job.config, job.layout, job.arch
    pp = layout.coordinates(rank).pp
    networks = measure(job, rank)
    trained = [networks.policy, *([networks.critic] if networks.critic else [])]
    fused = config.engine.layers == "te"
    work = Workload(arch, layout, job.tokens, job.item, fused, IMBALANCE)
    layers = stage_layers(layout, arch, pp)
    activations = stage_activations(work, layers, pp, job.micro_batches, config.engine.recomputation)
    is_last = pp == layout.pp - 1
    moments = max(network.optimizer for network in trained) // (3 if job.item < FP32 else 2)
    return RankMemory(
        rank=rank,
        stage=pp,
        weights=networks.policy.weights,
        gradients=networks.policy.gradients,
        optimizer=networks.policy.optimizer,
        reference=networks.reference.weights if networks.reference else 0,
        critic=networks.critic.total if networks.critic else 0,
        fp8=_fp8_copies(job, rank),
        activations=round(activations.kept),
        layer=round(activations.layer) + max(network.largest for network in trained),
        logits=round(logits_bytes(work, config.engine.logit_chunk_tokens)) if is_last else 0,
        bucket=_bucket(job, rank),
        # torch's AdamW makes the root of all second moments at once; Transformer Engine and apex do not.
        step=0 if fused or memory_settings(config.optim) else moments,
        reserve=0 if config.engine.device == "cpu" else RESERVE * (2 if shares(config) else 1),
        host=sum(network.host for network in trained),
        served=served_bytes(arch, config.rollout.servers.tp, job.item) if shares(config) else 0,
    )


def shares(config: Config | SftConfig) -> TypeGuard[Config]:
    """Tells whether servers use the trainer's GPUs in turns with it."""
    return isinstance(config, Config) and config.rollout.servers.colocate


def _fp8_copies(job: Job, rank: int) -> int:
    """Transformer Engine keeps weights in fp8 from one micro-batch to the next: a copy for the forward pass, and one
    transposed for the backward pass. A critic is taken to be as large as the policy."""
    if job.config.engine.fp8 == "none":
        return 0
    copies = 2 * (2 if job.critic_optim else 1) + job.has_reference
    return copies * multiplied_elements(job.arch, job.layout, job.layout.coordinates(rank))


def _bucket(job: Job, rank: int) -> int:
    """Rank 0 holds two buckets of whole tensors, others at most one (engine/export.py)."""
    if not isinstance(job.config, Config):
        return 0
    bucket = max(job.config.weights.bucket_mib * MIB, largest_tensor(job.arch) * job.item)
    return bucket * (2 if rank == 0 else 1)


def all_ranks(job: Job, measure: Measure = counted) -> list[RankMemory]:
    """Returns the memory of one rank of each sort."""
    return [rank_memory(job, rank, measure) for rank in differing_ranks(job.layout, job.arch)]


def largest_rank(job: Job, measure: Measure = counted) -> RankMemory:
    return max(all_ranks(job, measure), key=lambda memory: memory.total)
