"""`megatron-rl plan`: what a run needs on a cluster, before anything starts; and the lines of it in a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.config.load import C, ConfigError, check_companions, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.sharing import fraction_problem
from megatron_rl.gpus import GPUS, Gpu
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.fields import ModelError
from megatron_rl.planner.candidates import DEGREES, Proposal, proposals, single_changes
from megatron_rl.planner.memory import GIB, PASSING, Job, RankMemory, RankNetworks, all_ranks, largest_rank, shares
from megatron_rl.planner.roofline import MFU, StepTime, step_time

KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "critic": "critic",
    "fp8": "weights in fp8",
    "reserve": "context, NCCL",
    "activations": "activations",
    "layer": "backward pass of a layer",
    "logits": "logits",
    "step": "temporaries of Adam",
    "bucket": "exported buckets",
}
"""RankMemory's fields in the order in which they are shown."""
WIDTH = 132


def read_job(cls: type[C], path: Path, overrides: Sequence[str], gpus: int) -> Job:
    """Reads configuration and config.json alone: no weights need be there. Raises ConfigError with all mistakes."""
    config = load_config(cls, path, overrides)
    try:
        arch = read_architecture(config.model.path)
    except ModelError as error:
        raise ConfigError(f"model.path: {error}") from None
    layout = check_config(config, arch, gpus)
    if isinstance(config, Config):
        check_companions(config, arch, layout)
    return Job(config, arch, layout)


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for a GPU of which no figures are known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu: found {name}, expected one of {', '.join(GPUS)}")
    return GPUS[name]


def forecast(job: Job, gpu: Gpu, memory_gib: float) -> bool:
    """Prints the plan; returns whether the run fits into `memory_gib` on every GPU."""
    console = Console(width=WIDTH, highlight=False)
    ranks = all_ranks(job, built)
    largest = max(ranks, key=lambda rank: rank.total)
    limit = round(memory_gib * GIB)
    console.print(_describe_layout(job), soft_wrap=True)
    console.print(_memory_table(ranks))
    if host := max(rank.host for rank in ranks):
        console.print(f"optimizers take {_gib(host)} of the host's memory for each rank", soft_wrap=True)
    console.print(_describe_time(step_time(job, gpu)), soft_wrap=True)
    problem = None
    if shares(job.config):
        console.print(_describe_sharing(job.config, largest), soft_wrap=True)
        problem = fraction_problem(job.config, job.arch, job.item, limit)
    if problem:
        console.print(problem, soft_wrap=True)
    fits = largest.total <= limit and not problem
    console.print(
        f"{'fits' if fits else 'does not fit'}: rank {largest.rank} needs {_gib(largest.total)} of {memory_gib:g} GiB",
        soft_wrap=True,
    )
    if not fits:
        _print_changes(console, job, limit)
    _print_proposals(console, job, gpu, limit)
    return fits


def memory_lines(job: Job) -> str:
    """Returns two lines for a dry run: the memory of the largest rank, and its kinds."""
    memory = largest_rank(job)
    amounts = {kind: f"{name} {_amount(size)}" for kind, name in KINDS.items() if (size := getattr(memory, kind))}
    lasting = ", ".join(text for kind, text in amounts.items() if kind not in PASSING)
    passing = ", ".join(text for kind, text in amounts.items() if kind in PASSING)
    total = _amount(memory.total) + (f", and {_amount(memory.host)} of its host" if memory.host else "")
    return (
        f"memory of the largest rank ({memory.rank}): about {total}; megatron-rl plan tells more\n"
        f"  {lasting}; not all at once: {passing}"
    )


def built(job: Job, rank: int) -> RankNetworks:
    """Builds the rank's networks without values (pretended.py), and counts them."""
    from megatron_rl.planner.pretended import build, count_network, pretended_rank

    path, engine, layout = job.config.model.path, job.config.engine, job.layout
    critic = reference = None
    with pretended_rank(layout, rank) as place:
        policy = count_network(build(path, layout, place, engine, job.config.optim), job.config.optim)
        if isinstance(job.config, Config) and job.config.critic is not None:
            at = job.config.critic.path or path
            optim = job.config.critic.optim
            critic = count_network(build(at, layout, place, engine, optim, value_head=True), optim)
        if isinstance(job.config, Config) and job.has_reference:
            reference = count_network(build(job.config.model.reference or path, layout, place, engine, None), None)
    return RankNetworks(policy, critic, reference)


def _describe_layout(job: Job) -> str:
    layout, engine = job.layout, job.config.engine
    degrees = ", ".join(f"{key}={getattr(layout, key)}" for key in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp"))
    layers = "Transformer Engine" if engine.layers == "te" else "plain PyTorch"
    return (
        f"{layout.world_size} GPUs: {degrees}\n{layers} layers, recompute {engine.recompute}, micro-batches of "
        f"{job.tokens} tokens, {job.micro_batches} on each replica\nGiB of each sort of rank; what is below the line "
        "does not exist all at once:"
    )


def _memory_table(ranks: Sequence[RankMemory]) -> Table:
    table = Table(show_footer=True)
    table.add_column("kind", footer="in all")
    for rank in ranks:
        table.add_column(f"rank {rank.rank}, stage {rank.stage}", footer=f"{rank.total / GIB:.1f}", justify="right")
    for kind, name in KINDS.items():
        values = [getattr(rank, kind) for rank in ranks]
        if any(values):
            table.add_row(name, *(f"{value / GIB:.1f}" for value in values), end_section=kind == "reserve")
    return table


def _describe_sharing(config: Config, rank: RankMemory) -> str:
    servers = config.rollout.servers
    return (
        f"servers share the GPUs in turns ({servers.launch} of {servers.tp} GPUs): with the context of a server's "
        f"process, rank {rank.rank} needs {_gib(rank.static + rank.peak)} to train, and {_gib(rank.sync)} while a "
        f"server's weights ({_gib(rank.served)}) are set; what is then in the host's memory is not counted"
    )


def _describe_time(time: StepTime) -> str:
    return (
        f"a step trains in about {_seconds(time.total)} (an estimate: arithmetic at {MFU:.0%} of the peak "
        f"{_seconds(time.compute)}, exchange {_seconds(time.exchange)}, bubble {_seconds(time.bubble)}; "
        f"{time.flops / 1e9:.0f} GFLOPs to train on a token); sampling is not in it"
    )


def _print_changes(console: Console, job: Job, limit: int) -> None:
    changes = single_changes(job, limit)
    if not changes:
        console.print(
            f"no single change of {', '.join(DEGREES)}, recomputation, optimizer, tokens of a micro-batch"
            f"{' or reference' if job.has_reference else ''} makes it fit",
            soft_wrap=True,
        )
        return
    listed = "; ".join(f"{change.text} ({_gib(change.memory.total)})" for change in changes)
    console.print(f"any one of these makes it fit: {listed}", soft_wrap=True)


def _print_proposals(console: Console, job: Job, gpu: Gpu, limit: int) -> None:
    found = proposals(job, gpu, limit)
    if not found:
        console.print(f"no layout of {job.layout.world_size} GPUs fits with these layers and micro-batches")
        return
    table = Table(title="layouts that fit, by estimated time")
    for column in ("overrides", "GiB", "time of a step"):
        table.add_column(column, justify="left" if column == "overrides" else "right")
    for proposal in found:
        table.add_row(_overrides(proposal), f"{proposal.memory.total / GIB:.1f}", _seconds(proposal.time.total))
    console.print(table)


def _overrides(proposal: Proposal) -> str:
    layout = proposal.job.layout
    degrees = [f"parallel.{key}={getattr(layout, key)}" for key in DEGREES]
    return " ".join([*degrees, f"engine.recompute={proposal.job.config.engine.recompute}"])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
