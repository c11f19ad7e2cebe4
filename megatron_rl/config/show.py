"""What a dry run shows: which rank holds what under a layout. No torch."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from megatron_rl.config.layout import Coordinates, Layout, fitting_sizes, listed
from megatron_rl.config.schema import Config, EngineConfig, SftConfig
from megatron_rl.data.schedule import SampleSize, StepPlan, plan
from megatron_rl.models.architecture import Architecture

MAX_RANKS = 64


def stage_layers(layout: Layout, arch: Architecture, pp: int) -> list[range]:
    """Layers of pipeline stage `pp`, from 0, one range for each virtual stage."""
    return layout.split(arch.num_layers)[pp :: layout.pp]


def rank_experts(layout: Layout, arch: Architecture, ep: int) -> range:
    """Experts, of every MoE layer, that expert-parallel rank `ep` holds; empty for a dense model."""
    share = arch.num_experts // layout.ep
    return range(ep * share, (ep + 1) * share)


def show_layout(layout: Layout, arch: Architecture, engine: EngineConfig) -> None:
    """Prints the degrees, the budget of a micro-batch, and what each rank holds."""
    degrees = ", ".join(f"{key}={getattr(layout, key)}" for key in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp"))
    budget = engine.max_tokens_per_micro_batch
    table = Table(
        title=f"{layout.world_size} ranks: {degrees}",
        caption=f"micro-batch: at most {budget} packed tokens, {budget // layout.cp} a rank",
    )
    axes = [field.name for field in dataclasses.fields(Coordinates)]
    for column in ("rank", *axes, "layers", "experts"):
        table.add_column(column, justify="right")
    for rank in range(min(layout.world_size, MAX_RANKS)):
        at = layout.coordinates(rank)
        layers = " ".join(map(_span, stage_layers(layout, arch, at.pp)))
        numbers = (str(getattr(at, axis)) for axis in axes)
        table.add_row(str(rank), *numbers, layers, _span(rank_experts(layout, arch, at.ep)))
    console = Console()
    console.print(table)
    if layout.world_size > MAX_RANKS:
        console.print(f"... and {layout.world_size - MAX_RANKS} ranks more")


def show_sizes(arch: Architecture) -> None:
    """Prints which degrees of parallelism fit the model, whatever the world."""
    keys = ("tp", "ep", "etp") if arch.num_experts else ("tp",)
    sizes = "; ".join(f"{key} {listed(fitting_sizes(key, arch))}" for key in keys)
    text = (
        f"sizes that fit this model: {sizes}; pp * vpp up to {arch.num_layers}, with parallel.stage_layers for stages "
        "of your own; any cp"
    )
    Console().print(text, highlight=False, soft_wrap=True)


def show_schedule(config: Config | SftConfig, layout: Layout) -> None:
    """Prints what a mini-batch is cut into if all its samples are as long as the configuration allows."""
    samples, longest = longest_sample(config)
    micro_batches = largest_step(config, layout).micro_batches
    empty = sum(not part for replica in micro_batches for part in replica)
    text = (
        f"mini-batch: {samples} samples of at most {longest} tokens; at their longest {len(micro_batches[0])} "
        f"micro-batches on each of {layout.dp} data-parallel replicas"
    )
    if empty:
        text += f", {empty} of these {len(micro_batches[0]) * layout.dp} empty: the samples do not divide"
    Console().print(text, highlight=False, soft_wrap=True)


def largest_step(config: Config | SftConfig, layout: Layout) -> StepPlan:
    """The plan of one mini-batch whose samples are all as long as the configuration allows."""
    samples, longest = longest_sample(config)
    return plan(
        [SampleSize(i, i, longest, 1) for i in range(samples)],
        mini_batches=1,
        dp=layout.dp,
        max_tokens=config.engine.max_tokens_per_micro_batch,
        micro_batch_multiple=layout.micro_batch_multiple,
        align=layout.sequence_multiple,
    ).steps[0]


def longest_sample(config: Config | SftConfig) -> tuple[int, int]:
    """Returns the samples of a mini-batch, and the tokens of the longest that the configuration allows."""
    if isinstance(config, SftConfig):
        return config.batch_size, config.data.max_tokens
    groups = config.rollout.prompts_per_step // config.train.mini_batches
    return groups * config.rollout.group_size, config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "-"
