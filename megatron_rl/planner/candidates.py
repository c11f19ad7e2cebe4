"""Finds what makes a run fit, by trying: single changes of its configuration, and other layouts. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.layout import Layout, LayoutError, check_layout
from megatron_rl.config.plain_layers import plain_features
from megatron_rl.config.schema import Config, ParallelConfig
from megatron_rl.config.show import longest_sample
from megatron_rl.config.switches import NoKL
from megatron_rl.gpus import Gpu
from megatron_rl.planner.memory import Job, RankMemory, largest_rank
from megatron_rl.planner.roofline import NODE, StepTime, step_time

DEGREES = ("tp", "pp", "ep", "cp")
PROPOSED = 3
"""Layouts that are proposed."""
RECOMPUTE = ("none", "full")
"""Recomputation of core_attn is not tried: attention's kernels keep no scores, so it saves next to nothing."""


@dataclass(frozen=True)
class Change:
    """One change, as it would be written on the command line, and the largest rank with it."""

    text: str
    memory: RankMemory


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, with its recomputation."""

    job: Job
    memory: RankMemory
    time: StepTime


def single_changes(job: Job, limit: int) -> list[Change]:
    """Returns the smallest change of each sort after which the largest rank needs at most `limit` bytes."""
    found = []
    for changes in _sorts(job):
        tried = (Change(text, largest_rank(changed)) for text, changed in changes)
        found += [change for change in tried if change.memory.total <= limit][:1]
    return found


def _sorts(job: Job) -> Iterator[Iterator[tuple[str, Job]]]:
    """Yields for each sort of change (text, job), smallest change first."""
    for key in DEGREES:
        yield _degrees(job, key)
    yield iter([_of_engine(job, recompute="full")] if job.config.engine.recompute != "full" else [])
    yield _budgets(job)
    yield _transformer_engine(job)
    yield _optimizers(job)
    if job.has_reference:
        yield iter([("objective.kl.kind=none", _without_reference(job))])


def _degrees(job: Job, key: str) -> Iterator[tuple[str, Job]]:
    size = getattr(job.layout, key)
    while (size := 2 * size) <= job.layout.world_size:
        if changed := on_layout(job, **{key: size}):
            yield f"parallel.{key}={size}", changed


def _budgets(job: Job) -> Iterator[tuple[str, Job]]:
    """Halves the micro-batch, down to one sample at its longest."""
    longest, budget = longest_sample(job.config)[1], job.config.engine.max_tokens_per_micro_batch
    while budget > longest:
        budget = max(budget // 2, longest)
        yield _of_engine(job, max_tokens_per_micro_batch=budget)


def _transformer_engine(job: Job) -> Iterator[tuple[str, Job]]:
    """Yields the job with Transformer Engine's layers, if it has not them and they have run with such a model."""
    engine = job.config.engine
    if engine.layers != "te" and engine.device != "cpu" and engine.dtype == "bf16" and not plain_features(job.arch):
        yield _of_engine(job, layers="te")


def _optimizers(job: Job) -> Iterator[tuple[str, Job]]:
    """Yields the job with the policy's optimizer smaller, and then out of the GPU's memory."""
    optim, engine = job.config.optim, job.config.engine
    if engine.device == "cpu" or engine.dtype == "fp32" or optim.offload:
        return
    for key, value in (("moments_dtype", "bf16"), ("offload", 1)):
        changed = optim.model_copy(update={"moments_dtype": "fp32", key: value})
        config = job.config.model_copy(update={"optim": changed})
        yield f"optim.{key}={value}", dataclasses.replace(job, config=config)


def _of_engine(job: Job, **values: Any) -> tuple[str, Job]:
    ((key, value),) = values.items()
    engine = job.config.engine.model_copy(update=values)
    config = job.config.model_copy(update={"engine": engine})
    return f"engine.{key}={value}", dataclasses.replace(job, config=config)


def _without_reference(job: Job) -> Job:
    assert isinstance(job.config, Config)
    objective = job.config.objective.model_copy(update={"kl": NoKL()})
    return dataclasses.replace(job, config=job.config.model_copy(update={"objective": objective}))


def on_layout(job: Job, **degrees: int) -> Job | None:
    """Returns the job with other degrees of parallelism in the same world; None if they do not fit it or the model."""
    parallel = job.config.parallel.model_copy(update={**degrees, "stage_layers": None})
    try:
        layout = Layout.resolve(parallel, job.layout.world_size)
    except LayoutError:
        return None
    if check_layout(layout, job.arch, job.config.engine):
        return None
    config = job.config.model_copy(update={"parallel": parallel})
    return dataclasses.replace(job, config=config, layout=layout)


def proposals(job: Job, gpu: Gpu, limit: int) -> list[Proposal]:
    """Returns the layouts whose largest rank needs at most `limit` bytes, by estimated time; of layouts that differ in
    recomputation alone the faster."""
    best: dict[ParallelConfig, Proposal] = {}
    for layout in _layouts(job):
        for recompute in RECOMPUTE:
            _, tried = _of_engine(layout, recompute=recompute)
            memory = largest_rank(tried)
            if memory.total <= limit:
                best.setdefault(tried.config.parallel, Proposal(tried, memory, step_time(tried, gpu)))
    return sorted(best.values(), key=lambda proposal: proposal.time.total)[:PROPOSED]


def _layouts(job: Job) -> Iterator[Job]:
    """Yields the job on layouts with degrees that are powers of two: tensor parallelism within a node."""
    world, experts = job.layout.world_size, job.arch.num_experts
    sizes = [1 << power for power in range(world.bit_length())]
    grid = itertools.product(
        (size for size in sizes if size <= NODE),
        (size for size in sizes if size <= job.arch.num_layers),
        (size for size in sizes if size <= max(experts, 1)),
        (size for size in sizes if size <= NODE),
    )
    for tp, pp, ep, cp in grid:
        if tp * pp * cp <= world and (tried := on_layout(job, tp=tp, pp=pp, ep=ep, cp=cp, vpp=1, etp=1)):
            yield tried
