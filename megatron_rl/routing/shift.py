"""Computes the router shift of RSPO [2510.23027]: how little the routers have moved from pi_old to pi_theta, by token.

    gamma = exp(-Delta), Delta the mean over the model's MoE layers of
    d = (1/K) sum over k of |log p_theta(e_k) - log p_old(e_k)|

e_1 .. e_K are the experts that pi_old used (the replayed ones under R3); p is the router's softmax over all experts.
gamma is exactly 1 if no router has moved. Both means are geometric, so ranks only add up d. Shapes: R rows (tokens of a
rank, padding included), K experts, T packed positions.

Two forward passes are observed. `keep` observes the pass of pi_old's log-probs. `compare` observes a pass right before
the update, with the update's weights, packing and routes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.data.packing import PackedBatch
from megatron_rl.ranks.place import Place
from megatron_rl.routing.by_token import sum_over_replica
from megatron_rl.routing.replay import Tap
from megatron_rl.routing.scores import router_logprobs
from megatron_rl.routing.slicing import ids_dtype


class RouterShift:
    """Router shift of one mini-batch on one rank: of its rows and its own MoE layers."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        """`rows` are the R of each micro-batch."""
        self.distances = [torch.zeros(count, device=device) for count in rows]
        """[R] fp32 each: d summed over this rank's layers, after the second pass. A stage may have no MoE layers."""
        self._old: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def keep(self, micro_batch: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
        """Observer of pi_old's pass. Stores K ids and K log-probs for each row and layer until they are compared.

        With at most 256 experts an id and its log-prob take 5 bytes.
        """
        ids = used.to(ids_dtype(tap.num_experts))
        self._old[micro_batch, tap.layer] = ids, router_logprobs(tap, scores).gather(1, used)

    def compare(self, micro_batch: int, tap: Tap, scores: Tensor, live: Tensor, used: Tensor) -> None:
        """Observer of pi_theta's pass."""
        ids, old = self._old.pop((micro_batch, tap.layer))
        self.distances[micro_batch] += router_distance(router_logprobs(tap, scores).gather(1, ids.long()), old)


def router_distance(new: Tensor, old: Tensor) -> Tensor:
    """Returns d of one layer, [R]: the mean over experts of |new - old|, both [R, K] log-probs [2510.23027]."""
    return (new - old).abs().mean(-1)


def packed_shift(
    distances: Sequence[Tensor], batches: Sequence[PackedBatch], moe_layers: int, layout: Layout, place: Place
) -> list[Tensor]:
    """[T] fp32 for each micro-batch, in packed order, on every rank of the replica; collective over it.

    `distances`, [rows] each, are sums over a rank's own layers (RouterShift); `moe_layers` counts the
    layers of the whole model.
    """
    sums = sum_over_replica(distances, batches, layout, place)
    return [each.div(moe_layers).neg().exp().to(distances[0].device) for each in sums]
