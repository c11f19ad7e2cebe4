"""An all-reduce of metrics that only one rank has."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rl.lab.sketch import Kind, MetricAccumulator

KINDS = {"total": Kind.SUM, "fraction": Kind.MEAN, "value": Kind.TAIL, "weight": Kind.RATIO}
VALUES = [-1.0, 0.5, 2.0]


def accumulate() -> MetricAccumulator:
    metrics = MetricAccumulator(KINDS)
    for name in KINDS:
        metrics.add(name, torch.tensor(VALUES))
    return metrics


def reduce() -> dict[str, float]:
    # Rank 0 acts as an earlier pipeline stage.
    metrics = accumulate() if dist.get_rank() == 1 else MetricAccumulator(KINDS)
    dist.all_reduce(metrics.sums)
    dist.all_reduce(metrics.maxima, op=dist.ReduceOp.MAX)
    return metrics.finalize()
