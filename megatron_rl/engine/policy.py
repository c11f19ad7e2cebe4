"""The policy on this rank, or its reference: a network that gives the log-probs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.network import Approve, Network, UpdateResult, always
from megatron_rl.engine.step import LossFunction, forward
from megatron_rl.ranks.place import Place
from megatron_rl.routing.replay import Observer, Routers, RoutingPass
from megatron_rl.routing.slicing import RankRoutes

TokenLoss = Callable[..., Tensor]
"""(micro-batch index, log-probs [T], entropy [T]) -> scalar loss; entropy carries no gradient. The log-probs [T, k] of
mu's most likely tokens follow if the micro-batch has them."""


class Policy(Network):
    """A Network that gives log-probs. Its methods are collective."""

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        place: Place,
        engine: EngineConfig,
        device: torch.device,
        optim: OptimConfig | None,
        temperature: float = 1.0,
        frozen: bool = False,
    ) -> None:
        super().__init__(model_dir, layout, place, engine, device, optim, temperature=temperature, frozen=frozen)
        self.temperature = temperature
        self.routers = Routers(self.models, self.arch.router, engine.recomputation)

    def routing_pass(
        self, routes: Sequence[RankRoutes] | None = None, *, record: bool = False, observers: Sequence[Observer] = ()
    ) -> RoutingPass:
        """Makes what tells the routers what to do in one call of logprobs, gradients or update."""
        return RoutingPass(self.routers, routes, record=record, observers=observers)

    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        temperature: float | None = None,
        routing: RoutingPass | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns (log-prob of each position's label, entropy), [T] fp32 each, per micro-batch.

        Returns [] if this is not the last pipeline stage. Logits are divided by `temperature`, which defaults to the
        policy's own.

        The stages stay in training mode: there is no dropout, and the same code path as the update's forward
        pass makes the importance ratios of the first mini-batch exactly 1.
        """
        for model in self.models:
            model.temperature = temperature or self.temperature
        try:
            outputs = forward(self.stages, self.micro_batches(batches), routing)
            return [(output[:, 0], output[:, 1]) for output in outputs]
        finally:
            for model in self.models:
                model.temperature = self.temperature

    def logprobs_with_top(
        self, batches: Sequence[PackedBatch], routing: RoutingPass | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As `logprobs`, and the log-probs [T, k] of each micro-batch's top tokens; k is 0 if it has none."""
        outputs = forward(self.stages, self.micro_batches(batches, top=True), routing)
        return [(output[:, 0], output[:, 1], output[:, 2:]) for output in outputs]

    def gradients(self, batches: Sequence[PackedBatch], loss: TokenLoss, routing: RoutingPass | None = None) -> None:
        """Leaves the gradient of the summed loss in each parameter's main_grad."""
        self.accumulate(batches, _of_columns(loss), routing)

    def update(
        self,
        batches: Sequence[PackedBatch],
        loss: TokenLoss,
        routing: RoutingPass | None = None,
        approve: Approve = always,
    ) -> UpdateResult:
        """One optimizer step; see Network.step."""
        return self.step(batches, _of_columns(loss), routing, approve)


def _of_columns(loss: TokenLoss) -> LossFunction:
    def of_output(index: int, output: Tensor) -> Tensor:
        top = () if output.shape[1] == 2 else (output[:, 2:],)
        return loss(index, output[:, 0], output[:, 1].detach(), *top)

    return of_output
