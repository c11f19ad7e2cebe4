"""What policy and critic share on this rank: stock Megatron-Core stages, loaded from and exported to Hugging Face
weights, and the optimizer that trains them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.data_parallel import ddp_config, gather_weights, wrap_stages
from megatron_rl.engine.export import export_stream, model_ranks
from megatron_rl.engine.frozen import digest_frozen, freeze
from megatron_rl.engine.grad_norms import grad_norms, norm_groups, reported_norms, total_norm
from megatron_rl.engine.layers.choice import choose_layers
from megatron_rl.engine.layers.fused_gradients import has_apex_kernel
from megatron_rl.engine.megatron_config import transformer_config
from megatron_rl.engine.micro_batch import MicroBatch, micro_batch
from megatron_rl.engine.optimizer import build_optimizer, check_machine, optimizer_parts
from megatron_rl.engine.stages import build_stages
from megatron_rl.engine.step import LossFunction, forward_backward
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.binding import bind, parameter_kinds
from megatron_rl.models.weights_io import load_weights
from megatron_rl.ranks.collectives import together
from megatron_rl.ranks.place import Place
from megatron_rl.routing.replay import RoutingPass


class NonFiniteGradientError(UserError):
    """More optimizer steps of a network than its max_skipped had a gradient that was not finite."""


Approve = Callable[[dict[str, float]], bool]
"""Says, from the gradient norms, whether the optimizer may step."""


def always(norms: dict[str, float]) -> bool:
    return True


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step says of itself, the same on every rank."""

    grad_norm: float  # global, of the weights that train, before clipping
    grad_norms: dict[str, float]  # the same by kind of weight, and of routers by layer
    lr: float
    skipped: bool  # the gradient was not finite or the step was not approved, and no weight was changed


class Network:
    """One model under one layout. Every public method is collective: all ranks call it with the same arguments,
    but for the micro-batches, which are each data-parallel replica's own and as many on every rank."""

    optim_section: ClassVar = "optim"
    metrics_prefix: ClassVar = ""

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        place: Place,
        engine: EngineConfig,
        device: torch.device,
        optim: OptimConfig | None,
        *,
        temperature: float = 1.0,
        frozen: bool = False,
        value_head: bool = False,
    ) -> None:
        """Without `optim` gradients are reduced whole into each parameter's main_grad (for comparing them); `frozen`
        has no gradients at all, nor their buffers. Otherwise the kinds of weights in `optim.freeze` do not
        train."""
        self.arch: Architecture = read_architecture(model_dir, value_head)
        self.model_dir = model_dir
        self.layout = layout
        self.place = place
        self.engine = engine
        self.device = device
        self.skipped = 0  # optimizer steps, of the whole run
        self.moved: Callable[[], None] = lambda: None
        """Called for each bucket that is exported."""
        torch.use_deterministic_algorithms(engine.deterministic)  # the same for all networks of a run
        self.layers = choose_layers(engine, self.arch)
        if optim is not None:
            check_machine(optim, self.optim_section, device)
        fused = {"fused_kernels": self.layers.fused_kernels, "fused_gradients": has_apex_kernel(device)}
        config = transformer_config(self.arch, engine, layout, **fused)
        stages = build_stages(self.arch, engine, layout, config, self.layers, temperature)
        # Most weights are made where they belong, but norms and routers on the CPU.
        self.models = [model.to(device) for model in stages]
        ranks, names = model_ranks(layout, place.rank), self.layers.weight_names
        if device.type != "meta":  # there a network is built to be counted, and has no values
            with together(place.control):  # one rank's share may be damaged, and another's not
                self.unused_weights = load_weights(list(self.models), self.arch, model_dir, ranks, names)
        self.stages: list[Any] = list(self.models)
        if frozen:
            for model in self.models:
                model.requires_grad_(False)
            return
        slots = bind(list(self.models), self.arch, ranks, names)
        if optim is not None:
            freeze(self.models, parameter_kinds(slots), optim.freeze)
        self.stages = wrap_stages(self.models, config, ddp_config(engine, layout, trains=optim is not None))
        if optim is not None:
            self._max_skipped = optim.max_skipped
            self._norm_groups = norm_groups(slots)
            self._norms = reported_norms(self.arch, optim.freeze)
            self.optimizer, self.scheduler = build_optimizer(optim, self.stages, engine)

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Digest of this rank's frozen weights, which never change; empty if it has none."""
        return digest_frozen(self.models)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs, values and losses."""
        return self.place.pp == self.layout.pp - 1

    def parameters(self) -> int:
        """Parameters of this rank, without those of other ranks."""
        return sum(p.numel() for model in self.models for p in model.parameters())

    def micro_batches(self, batches: Sequence[PackedBatch], top: bool = False) -> list[MicroBatch]:
        return [micro_batch(b, self.layout.cp, self.place.cp, self.device, self.layers, top) for b in batches]

    def accumulate(
        self, batches: Sequence[PackedBatch], loss: LossFunction, routing: RoutingPass | None = None
    ) -> None:
        """Leaves the gradient of the summed loss in each parameter's main_grad."""
        for stage in self.stages:
            stage.zero_grad_buffer()
        forward_backward(self.stages, self.micro_batches(batches, top=True), loss, routing)

    def step(
        self,
        batches: Sequence[PackedBatch],
        loss: LossFunction,
        routing: RoutingPass | None = None,
        approve: Approve = always,
    ) -> UpdateResult:
        """One optimizer step. With a non-finite gradient no weight and no state of the optimizer changes; the learning
        rate's schedule goes on. The same if `approve`, called with the gradient norms, says no; it
        must answer the same on every rank."""
        self.optimizer.zero_grad()
        self.accumulate(batches, loss, routing)
        self.scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        norms = grad_norms(self._norm_groups, self._norms, optimizer_parts(self.optimizer), self.device)
        total = total_norm(norms)
        is_finite, is_approved = math.isfinite(total), approve(norms)
        skipped = not (is_finite and is_approved)
        self.skipped += not is_finite
        if not skipped:
            self.optimizer.step()
        return UpdateResult(total, norms, lr=self.optimizer.param_groups[0]["lr"], skipped=skipped)

    def check_skipped(self) -> None:
        """Raises NonFiniteGradientError when too many steps were skipped; on every rank alike."""
        if self.skipped > self._max_skipped:
            prefix = self.metrics_prefix
            raise NonFiniteGradientError(
                f"{self.optim_section}.max_skipped: {self.skipped} optimizer steps of this run had a gradient that was "
                f"not finite, and {self._max_skipped} are allowed; none of them changed a weight. Look at {prefix}loss "
                f"and {prefix}grad_norm in the last lines of metrics.jsonl and at the rewards in the saved rollouts. "
                f"--resume with a larger {self.optim_section}.max_skipped goes on from the last checkpoint"
            )

    def gather_weights(self) -> None:
        """Makes every rank's copy of the weights whole. With engine.overlap all, an optimizer step leaves that to the
        next forward pass; call this before weights are read otherwise."""
        gather_weights(self.stages)

    def export(
        self,
        bucket_bytes: int,
        tensor_of: Callable[[torch.nn.Parameter], Tensor] | None = None,
        *,
        reuse: bool = False,
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Buckets of (Hugging Face name, whole tensor) on rank 0, empty lists elsewhere. With `tensor_of`, of what it
        gives for each parameter, as its gradient, and of weights that train alone. With `reuse` a bucket stays as it is
        until the next but one is asked for."""
        self.gather_weights()
        names, models = self.layers.weight_names, list(self.models)
        exported = export_stream(models, self.arch, self.layout, names, bucket_bytes, tensor_of, reuse)
        return map(self._moving, exported)

    def _moving(self, bucket: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        self.moved()
        return bucket
