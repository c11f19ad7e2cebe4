"""The critic of PPO on this rank: a network that gives the value of the state before each token.

It routes live: its routers are its own, and no rollout engine ever ran them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.network import Network, UpdateResult
from megatron_rl.engine.step import forward
from megatron_rl.ranks.place import Place


class Critic(Network):
    """A Network with a value head. A model without one gets a head of zeros, so all values are 0."""

    optim_section = "critic.optim"
    metrics_prefix = "critic/"

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        place: Place,
        engine: EngineConfig,
        device: torch.device,
        optim: OptimConfig | None,
    ) -> None:
        super().__init__(model_dir, layout, place, engine, device, optim, value_head=True)

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Returns V, [T] fp32 per micro-batch: at each position the value of the state in which its label is chosen.

        Returns [] if this is not the last pipeline stage.
        """
        return [output[:, 0] for output in forward(self.stages, self.micro_batches(batches))]

    def update(self, batches: Sequence[PackedBatch], loss: Callable[[int, Tensor], Tensor]) -> UpdateResult:
        """One optimizer step on loss(micro-batch index, V [T]); see Network.step."""
        return self.step(batches, lambda index, output: loss(index, output[:, 0]))
