"""The command line. What each command needs is imported when it runs, so that help, --dry-run and errors are quick."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.commands.cluster import launch, serve
from megatron_rl.commands.mistakes import UsageError, explain_too_long, explain_usage, is_too_long
from megatron_rl.commands.options import (
    Begins,
    ConfigFile,
    ForkOption,
    KeyVariable,
    Overrides,
    Recompute,
    ResumeOption,
    RunCommand,
    Version,
    check_recompute,
)
from megatron_rl.commands.reports import commands as commands_of_reports
from megatron_rl.config.bounds import MOST_RANKS
from megatron_rl.config.load import C, ConfigError
from megatron_rl.config.schema import Config, Device, EngineDtype, SftConfig
from megatron_rl.demo.first_run import demo
from megatron_rl.errors import UserError
from megatron_rl.garbage import collect_rarely
from megatron_rl.models.kinds import POLICY_KINDS
from megatron_rl.output import guarded_output
from megatron_rl.ranks.agreement import agree as agree_on
from megatron_rl.ranks.agreement import end, explain_fault, tell_launcher
from megatron_rl.stop import Stopped

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and layout, and stop.")]
OfSft = Annotated[bool, typer.Option("--sft", help="CONFIG is one of `sft`.")]
WorldSize = Annotated[
    int | None, typer.Option(min=1, max=MOST_RANKS, help="Ranks that --dry-run plans for; else torchrun's, or 1.")
]


Model = Annotated[Path, typer.Option(exists=True, file_okay=False, help="Hugging Face model directory")]


@app.callback()
def options(version: Version = False) -> None:
    """Reinforcement learning of mixture-of-experts language models on Megatron-Core and SGLang."""


@app.command(cls=RunCommand)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: ResumeOption = False,
    fork: ForkOption = None,
    world_size: WorldSize = None,
) -> None:
    """Trains a policy by RL. Start it with torchrun, one process per device."""
    if dry_run:
        _show(Config, config, overrides or [], world_size)
        return
    _refuse_world_size(world_size)
    begins = Begins(resume, fork)
    check = functools.partial(_check_start, begins)
    with agree_on("train", Config, config, overrides or [], check=check, begins=str(begins)) as loaded:
        from megatron_rl.train import train as run

        run(loaded, begins.resume, fork=begins.fork)


@app.command(cls=RunCommand)
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: ResumeOption = False,
    fork: ForkOption = None,
    world_size: WorldSize = None,
) -> None:
    """Fine-tunes a model on prompts with responses. Start it with torchrun."""
    if dry_run:
        _show(SftConfig, config, overrides or [], world_size)
        return
    _refuse_world_size(world_size)
    begins = Begins(resume, fork)
    check = functools.partial(_check_start, begins)
    with agree_on("sft", SftConfig, config, overrides or [], check=check, begins=str(begins)) as loaded:
        from megatron_rl.sft import sft as run

        run(loaded, begins.resume, fork=begins.fork)


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    sft: OfSft = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Ranks of the run; default: torchrun's, or 1.")
    ] = None,
) -> None:
    """Opens all that a start needs, servers given by URL too, and prints a line for each; starts and writes nothing."""
    from megatron_rl import preflight

    if sft:
        raise typer.Exit(preflight.run(SftConfig, config, overrides or [], world_size))
    raise typer.Exit(preflight.run(Config, config, overrides or [], world_size))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Number of GPUs, one for each rank")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=1, max=10000, help="GiB of one GPU; default: what --gpu has")
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200, for the estimate of time")] = "h100",
    sft: OfSft = False,
) -> None:
    """Says without a GPU how much memory each rank needs, and which layouts fit. Fails if the run does not fit."""
    from megatron_rl.planner.forecast import find_gpu, forecast, read_job

    found = find_gpu(gpu)
    job = read_job(SftConfig, config, overrides or [], gpus) if sft else read_job(Config, config, overrides or [], gpus)
    raise typer.Exit(0 if forecast(job, found, memory or found.memory_gib) else 1)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="study file, docs/studies.md")],
    task: Annotated[int | None, typer.Option(help="Do only this run, from 0, as in a Slurm array.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms, runs and tasks, and stop.")] = False,
) -> None:
    """Does the runs of a study that are left, and says what its rule makes of them. Starts its own ranks."""
    from megatron_rl.study.conductor import run_study

    run_study(file, task=task, dry_run=dry_run)


app.command(context_settings={"allow_extra_args": True})(serve)
app.command()(launch)


@app.command()
def doctor(
    server: Annotated[list[str] | None, typer.Option(metavar="URL", help="May be given several times.")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Model that is to be served")] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Run that the servers are for")
    ] = None,
    api_key_env: KeyVariable = None,
) -> None:
    """Checks that SGLang servers that run already do all that `train` needs; says which flag is missing."""
    from megatron_rl.doctor.examine import run

    raise typer.Exit(run(server or [], model, config, api_key_env))


@app.command()
def parity(
    model: Model,
    tokens: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSONL file: a list of token ids a line")],
    layout: Annotated[list[str], typer.Option(help="such as tp=2,pp=2,ep=2; may be given several times")],
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    recompute: Recompute = "none",
    device: Annotated[Device, typer.Option()] = "auto",
    url: Annotated[str | None, typer.Option(help="Also compare a live server's log-probs.")] = None,
    api_key_env: KeyVariable = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per layout.")] = False,
) -> None:
    """Compares the engine's log-probs and gradients with transformers'; fails past the bound. Starts its own ranks."""
    from megatron_rl.parity import run
    from megatron_rl.rollout.pool import read_api_key

    api_key = read_api_key(api_key_env, "--api-key-env") if api_key_env else None
    status = run(model, tokens, layout, dtype, recompute, device, url, as_json=json, api_key=api_key)
    raise typer.Exit(status)


@app.command()
def certify(
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Default: a random one.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="such as tp=2,pp=2,ep=2; default: a grid of ten")] = None,
    recompute: Annotated[
        list[str] | None,
        typer.Option(callback=check_recompute, help="as engine.recompute; default: five kinds, one after another"),
    ] = None,
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    device: Annotated[Device, typer.Option()] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object per layout and recomputation.")] = False,
) -> None:
    """Proves that routing replay gives each router its own rows; fails where it does not. Starts its own ranks."""
    from megatron_rl.certify import GRID, RECOMPUTE, run

    raise typer.Exit(run(model, layout or GRID, recompute or RECOMPUTE, dtype, device, as_json=json))


app.add_typer(commands_of_reports)


@app.command()
def graft(
    donor: Annotated[Path, typer.Argument(metavar="FROM", exists=True, file_okay=False, help="Model that gives")],
    base: Annotated[Path, typer.Argument(metavar="INTO", exists=True, file_okay=False, help="Model that receives")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the new model")],
    weights: Annotated[
        list[str], typer.Option(metavar="KIND", help=f"{', '.join(POLICY_KINDS)}; may be given several times")
    ],
) -> None:
    """Writes a model that is INTO with FROM's weights of some kinds, such as its routers."""
    from megatron_rl.models.graft import graft as run

    kinds = [kind for kind in POLICY_KINDS if kind in weights]
    if unknown := [name for name in weights if name not in kinds]:
        raise ConfigError(f"--weights: found {unknown[0]}, expected one of {', '.join(POLICY_KINDS)}")
    done = run(donor, base, out, kinds)
    print(f"{out}: {done.taken} tensors of {donor}, {done.kept} of {base}")


@app.command()
def dequantise(
    model: Annotated[
        Path, typer.Argument(metavar="FROM", exists=True, file_okay=False, help="Model with quantised weights")
    ],
    out: Annotated[Path, typer.Argument(metavar="INTO", help="Directory of the copy")],
) -> None:
    """Writes a copy of a model whose published weights are in fp8 or mxfp4, with these in bf16."""
    from megatron_rl.models.dequantise import dequantise as run

    done = run(model, out)
    print(f"{out}: {done.converted} tensors converted to bf16, {done.kept} as they were")


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="RUN[@STEP]", help="run_dir of a run, and the step of a checkpoint; else its newest"),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the model; new or empty")],
    critic: Annotated[bool, typer.Option("--critic", help="Write PPO's critic.")] = False,
    model: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Model that the run began with, if it has moved")
    ] = None,
) -> None:
    """Writes a checkpoint as a Hugging Face directory, whatever its layout. Needs no ranks and no GPU."""
    from megatron_rl.engine.named_checkpoint import CheckpointName
    from megatron_rl.engine.saved_model import export_checkpoint

    name = CheckpointName.parse(checkpoint, "RUN", needs_step=False)
    done = export_checkpoint(name, out, critic=critic, model=model)
    print(f"{out}: the {'critic' if critic else 'policy'} of {done.directory}, in {done.dtype}")


Step = Annotated[int, typer.Option(min=1, help="Rollout step of the run that rollout.replay_from names.")]


@app.command()
def replay_study(
    config: ConfigFile,
    overrides: Overrides = None,
    step: Step = 1,
    later: Annotated[Path | None, typer.Option(help="Model of pi_theta; default: that of pi_old")] = None,
    updates: Annotated[int, typer.Option(min=0, help="Optimizer steps that make pi_theta, in place of --later")] = 0,
    older: Annotated[Path | None, typer.Option(help="Model of r2-stale's routes")] = None,
    graft: Annotated[Path | None, typer.Option(help="Model of grafted-router's routers")] = None,
    agree: Annotated[int | None, typer.Option(min=1, help="Experts of r3-agreeing; default: all but one")] = None,
    routing: Annotated[list[str] | None, typer.Option(help="A routing; may be given several times")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="own, a preset or a YAML file; several times")] = None,
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = True,
) -> None:
    """Evaluates saved rollouts under many routings and objectives without training. Start it with torchrun."""
    from megatron_rl.counterfactual import replay_study as studies

    options = studies.StudyOptions(
        step=step,
        routings=tuple(routing or studies.ROUTINGS),
        objectives=tuple(objective or studies.all_objectives()),
        gradients=gradients,
        later=later,
        updates=updates,
        older=older,
        graft=graft,
        agree=agree,
    )

    def check(loaded: Config) -> None:
        studies.check_options(loaded, options)

    with agree_on("replay-study", Config, config, overrides or [], check=check) as loaded:
        lines = studies.replay_study(loaded, options)
    if lines:
        studies.print_study(lines)


@app.command()
def attribute(config: ConfigFile, overrides: Overrides = None, step: Step = 1) -> None:
    """Attributes the mismatch of saved rollouts to routing, precision, a layer or an expert. Start it with torchrun."""
    from megatron_rl.counterfactual import attribution

    with agree_on("attribute", Config, config, overrides or [], check=attribution.check_attribution) as loaded:
        lines = attribution.attribute(loaded, step)
    if lines:
        attribution.print_attribution(lines)


def _check_start(begins: Begins, loaded: Config | SftConfig) -> None:
    from megatron_rl.loop.start_checks import check_start

    begins.check()
    check_start(loaded)


def _show(cls: type[C], path: Path, overrides: Sequence[str], world_size: int | None) -> None:
    from megatron_rl.planner.dry_run import show

    show(cls, path, overrides, world_size)


def _refuse_world_size(world_size: int | None) -> None:
    if world_size is not None:
        raise ConfigError("--world-size: only --dry-run plans for a world; torchrun's --nproc-per-node starts one")


def main() -> None:
    """One `error:` and exit status 2 for what the user can fix; a traceback and status 1 for anything else."""
    collect_rarely()
    try:
        with guarded_output():
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.exit(status)
    except Stopped as stopped:  # rank 0 has said why
        tell_launcher(str(stopped))
        sys.exit(stopped.status)
    except UsageError as error:
        sys.exit(end(UserError(explain_usage(error))))
    except UserError as error:
        sys.exit(end(error))
    except BrokenPipeError:  # who read the output has seen enough
        sys.exit(1)
    except Exception as error:
        if is_too_long(error):
            sys.exit(end(UserError(explain_too_long(error))))
        explain_fault(error)
        sys.exit(1)
