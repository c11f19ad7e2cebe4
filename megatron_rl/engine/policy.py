"""The policy on this rank: stock Megatron-Core stages, loaded from and exported to Hugging Face weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.batch import MicroBatch, micro_batch
from megatron_rl.engine.grad_norms import grad_norms
from megatron_rl.engine.model import build_stages, transformer_config
from megatron_rl.engine.optimizer import build_optimizer, optimizer_parts
from megatron_rl.engine.parallel import Place
from megatron_rl.engine.step import LossFunction, forward, forward_backward
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.weights_io import ModelRanks, load_weights
from megatron_rl.routing.replay import Observer, Routers, RoutingPass
from megatron_rl.routing.slicing import RankRoutes
from megatron_rl.weights.export import ExportGroups, export_stream


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step says of itself, the same on every rank."""

    grad_norm: float  # global, before clipping
    grad_norms: dict[str, float]  # the same by kind of weight
    lr: float


class Policy:
    """One model under one layout. Every public method is collective: all ranks call it with the same arguments,
    but for the micro-batches, which are each data-parallel replica's own and as many on every rank."""

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        place: Place,
        engine: EngineConfig,
        device: torch.device,
        optim: OptimConfig | None,
        temperature: float = 1.0,
    ) -> None:
        """Without `optim` gradients are reduced whole into each parameter's main_grad (for comparing them)."""
        self.arch: Architecture = read_architecture(model_dir)
        self.model_dir = model_dir
        self.layout = layout
        self.place = place
        self.engine = engine
        self.device = device
        self.temperature = temperature
        config = transformer_config(self.arch, engine, layout)
        config.finalize_model_grads_func = finalize_model_grads
        stages = build_stages(self.arch, engine, layout, config, temperature)
        ranks = ModelRanks(
            tp_rank=place.tp,
            tp_size=layout.tp,
            ep_rank=place.ep,
            ep_size=layout.ep,
            etp_rank=place.etp,
            etp_size=layout.etp,
        )
        self.routers = Routers(stages)
        self.unused_weights = load_weights(list(stages), self.arch, model_dir, ranks)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=optim is not None, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        )
        self.stages = [
            DistributedDataParallel(config, ddp, stage, disable_bucketing=index > 0)
            for index, stage in enumerate(stages)
        ]
        if optim is not None:
            self.optimizer, self.scheduler = build_optimizer(optim, self.stages, engine.dtype == "bf16")

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and the loss."""
        return self.place.pp == self.layout.pp - 1

    def parameters(self) -> int:
        """Parameters of this rank, without those of other ranks."""
        return sum(p.numel() for stage in self.stages for p in stage.parameters())

    def _micro_batches(self, batches: Sequence[PackedBatch]) -> list[MicroBatch]:
        return [micro_batch(b, self.layout.cp, self.place.cp, self.device) for b in batches]

    def routing_pass(
        self, routes: Sequence[RankRoutes] | None = None, *, record: bool = False, observers: Sequence[Observer] = ()
    ) -> RoutingPass:
        """For one call of logprobs, gradients or update: what its routers are to do."""
        return RoutingPass(self.routers, routes, record=record, observers=observers)

    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        temperature: float | None = None,
        routing: RoutingPass | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-prob of each position's label and entropy, both [T] fp32, per micro-batch; [] off the last stage.

        They are those of logits / `temperature`; None is the policy's own.

        The stages stay in training mode: there is no dropout, and the same code path as the update's forward
        pass makes the importance ratios of the first mini-batch exactly 1.
        """
        stages = [stage.module for stage in self.stages]
        for stage in stages:
            stage.temperature = temperature or self.temperature
        try:
            return forward(self.stages, self._micro_batches(batches), routing)
        finally:
            for stage in stages:
                stage.temperature = self.temperature

    def gradients(self, batches: Sequence[PackedBatch], loss: LossFunction, routing: RoutingPass | None = None) -> None:
        """Leaves the gradient of the summed loss in each parameter's main_grad."""
        for stage in self.stages:
            stage.zero_grad_buffer()
        forward_backward(self.stages, self._micro_batches(batches), loss, routing)

    def update(
        self, batches: Sequence[PackedBatch], loss: LossFunction, routing: RoutingPass | None = None
    ) -> UpdateResult:
        """One optimizer step. Raises RuntimeError for a non-finite gradient, before any weight has changed."""
        self.optimizer.zero_grad()
        self.gradients(batches, loss, routing)
        self.scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        by_kind = grad_norms(self.stages, optimizer_parts(self.optimizer), self.device)
        total = math.hypot(*by_kind.values())
        if not math.isfinite(total):
            raise RuntimeError(
                f"non-finite gradients, norms {by_kind}; no weight was changed. Look at the ratios in the last lines "
                "of metrics.jsonl and at the rewards in the saved rollouts"
            )
        self.optimizer.step()
        return UpdateResult(total, by_kind, lr=self.optimizer.param_groups[0]["lr"])

    def export(
        self, bucket_bytes: int, tensor_of: Callable[[torch.nn.Parameter], Tensor] = lambda p: p.data
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Buckets of (Hugging Face name, whole tensor) on rank 0, empty lists elsewhere."""
        groups = ExportGroups(
            tp=parallel_state.get_tensor_model_parallel_group(),
            etp=parallel_state.get_expert_tensor_parallel_group(),
            ep=parallel_state.get_expert_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
        )
        return export_stream([stage.module for stage in self.stages], self.arch, groups, bucket_bytes, tensor_of)
