"""Compares gradients: norms and cosines by kind of weight, the same in every layout.

Each rank keeps its shards of a gradient. A weight that several ranks hold counts on one of them: on those that export
it (engine/export.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.engine.export import holders, model_ranks
from megatron_rl.engine.policy import Policy
from megatron_rl.models.binding import bind
from megatron_rl.models.kinds import POLICY_KINDS

Vectors = dict[str, Tensor]
"""By kind of weight, this rank's part of a gradient: fp32, one dimension, on the CPU."""
CHUNK = 1 << 20
"""Elements of each gradient that are in float64 at a time."""


def gradient_of(policy: Policy) -> Vectors:
    """Copies what Policy.gradients left on this rank, without the copies that other ranks hold."""
    rank = policy.place.rank
    parts: dict[str, list[Tensor]] = {kind: [] for kind in POLICY_KINDS}
    for slot in bind(list(policy.models), policy.arch, model_ranks(policy.layout, rank), policy.layers.weight_names):
        if slot.weight.trained and not slot.weight.copy and rank in holders(policy.layout, slot.weight, policy.arch):
            gradient = slot.of(slot.parameter.main_grad)  # type: ignore[attr-defined]
            parts[slot.weight.kind].append(gradient.detach().float().flatten().cpu())
    return {kind: torch.cat([torch.zeros(0), *pieces]) for kind, pieces in parts.items()}


def add(total: Vectors | None, more: Vectors, weight: float) -> Vectors:
    """Returns total + weight * more."""
    if total is None:
        return {kind: weight * vector for kind, vector in more.items()}
    return {kind: vector.add_(more[kind], alpha=weight) for kind, vector in total.items()}


def gram(gradients: Sequence[Vectors], policy: Policy) -> dict[str, Tensor]:
    """Returns the scalar products [n, n] float64 of n gradients for each kind of weight, and for `all`. Collective."""
    n = len(gradients)
    products = torch.zeros(len(POLICY_KINDS), n, n, dtype=torch.float64)
    for number, kind in enumerate(POLICY_KINDS):
        for pieces in zip(*(each[kind].split(CHUNK) for each in gradients), strict=True):
            rows = torch.stack(pieces).double()
            products[number] += rows @ rows.t()
    dist.all_reduce(products, group=policy.place.control)
    return {"all": products.sum(0), **dict(zip(POLICY_KINDS, products, strict=True))}


def norms(products: dict[str, Tensor], index: int) -> dict[str, float]:
    """Returns the norm of gradient `index` by kind of weight."""
    return {kind: math.sqrt(float(each[index, index])) for kind, each in products.items()}


def cosines(products: dict[str, Tensor], a: int, b: int) -> dict[str, float | None]:
    """Returns the cosine of gradients a and b by kind of weight; None if one of them is zero."""
    found: dict[str, float | None] = {}
    for kind, each in products.items():
        size = math.sqrt(float(each[a, a])) * math.sqrt(float(each[b, b]))
        found[kind] = float(each[a, b]) / size if size else None
    return found


def relative_difference(products: dict[str, Tensor], a: int, b: int) -> float | None:
    """Returns |g_a - g_b| / |g_a| over all weights; None if g_a is zero."""
    each = products["all"]
    square = max(float(each[a, a] - 2 * each[a, b] + each[b, b]), 0.0)
    return math.sqrt(square / float(each[a, a])) if each[a, a] else None
