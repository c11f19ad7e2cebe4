"""Finds the experts whose tokens have a mismatch, from the routes that they took on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.counterfactual.contrasts import ExpertContrast, expert_contrasts
from megatron_rl.counterfactual.ratio_figures import Doubles
from megatron_rl.data.packing import rank_rows
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_advantages import responses
from megatron_rl.engine.policy import Policy
from megatron_rl.routing.replay import Tap


class Visits:
    """Sums of a value per token over the tokens that visit each expert, on this rank's rows and layers."""

    def __init__(self, policy: Policy) -> None:
        arch = policy.arch
        self._policy = policy
        self._place = {layer: number for number, layer in enumerate(arch.moe_layers)}
        self._used: dict[tuple[int, int], Tensor] = {}
        self.sums = torch.zeros(3, len(arch.moe_layers), arch.num_experts, dtype=torch.float64)
        """Tokens, their values and the squares of these, by layer and expert."""

    def observe(self, micro_batch: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
        """Observer of a routing pass: keeps the experts that each row used until `add`."""
        self._used[micro_batch, tap.layer] = used.cpu()

    def add(self, mini_batch: MiniBatch, values: Mapping[int, Doubles]) -> None:
        """Adds the mini-batch whose pass was observed. values [|y|]: of each response's tokens, by sample number."""
        layout, place = self._policy.layout, self._policy.place
        for number, (packed, outcomes) in enumerate(zip(mini_batch.micro_batches, mini_batch.outcomes, strict=True)):
            row = np.zeros(packed.tokens)
            for outcome, at in responses(packed, outcomes):
                row[at] = values[outcome.index]
            mine = rank_rows(packed.cu_seqlens, cp=layout.cp, cp_rank=place.cp, tp=layout.tp, tp_rank=place.tp)
            counted = torch.from_numpy(packed.loss_mask[mine].astype(np.float64))
            value = torch.from_numpy(row[mine])
            for (micro_batch, layer), used in self._used.items():
                if micro_batch == number:
                    for slot in used.unbind(1):
                        for power, each in enumerate((counted, counted * value, counted * value.square())):
                            self.sums[power, self._place[layer]].index_add_(0, slot.long(), each)
        self._used.clear()

    def contrasts(self, values: Doubles) -> list[ExpertContrast]:
        """Returns all experts, the largest t first. values: of all tokens. Collective."""
        dist.all_reduce(self.sums, group=self._policy.place.control)
        return expert_contrasts(self.sums, values, self._policy.arch.moe_layers)
