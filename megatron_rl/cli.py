"""The command line. What each command needs is imported when it runs, so that help, --dry-run and errors are quick."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.layout import Layout
from megatron_rl.config.load import ConfigError, check_companions, check_config, dump_config, load_config
from megatron_rl.config.schema import Config, Device, EngineDtype, Recompute, ServerDtype, SftConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture, read_architecture

SECONDS_FOR_RANK_0 = 10.0

app = typer.Typer(
    help="Reinforcement learning of mixture-of-experts language models on Megatron-Core and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.lr=1e-5")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and layout, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")]
WorldSize = Annotated[int | None, typer.Option(min=1, help="Ranks that --dry-run plans for; else torchrun's, or 1.")]
Model = Annotated[Path, typer.Option(exists=True, file_okay=False, help="Hugging Face model directory")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    world_size: WorldSize = None,
) -> None:
    """Trains a policy by RL. Start it with torchrun, one process per device."""
    loaded = load_config(Config, config, overrides or [])
    arch, layout = _check(loaded, world_size, dry_run)
    if dry_run:
        _show(loaded, arch, layout)
        return
    from megatron_rl.train import train as run

    run(loaded, resume=resume)


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    world_size: WorldSize = None,
) -> None:
    """Fine-tunes a model on prompts with responses. Start it with torchrun."""
    loaded = load_config(SftConfig, config, overrides or [])
    arch, layout = _check(loaded, world_size, dry_run)
    if dry_run:
        _show(loaded, arch, layout)
        return
    from megatron_rl.sft import sft as run

    run(loaded, resume=resume)


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Hugging Face model directory")],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 30000,
    device: Annotated[Device, typer.Option()] = "auto",
    dtype: Annotated[ServerDtype, typer.Option(help="auto: the dtype in the model's config.json")] = "auto",
    tp: Annotated[int, typer.Option(min=1)] = 1,
    max_total_tokens: Annotated[int, typer.Option(min=1, help="KV cache, in tokens")] = 65536,
) -> None:
    """Starts a stock SGLang server with the flags that its device needs; what follows -- goes to SGLang as it is."""
    from megatron_rl.rollout.server import ServerOptions
    from megatron_rl.rollout.server import serve as run

    options = ServerOptions(
        model=model,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        tp=tp,
        max_total_tokens=max_total_tokens,
        extra_flags=tuple(context.args),
    )
    raise typer.Exit(run(options))


@app.command()
def parity(
    model: Model,
    tokens: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JSONL file: a list of token ids a line")],
    layout: Annotated[list[str], typer.Option(help="such as tp=2,pp=2,ep=2; may be given several times")],
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    recompute: Annotated[Recompute, typer.Option()] = "none",
    device: Annotated[Device, typer.Option()] = "auto",
    url: Annotated[str | None, typer.Option(help="Also compare a live server's log-probs.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per layout.")] = False,
) -> None:
    """Compares the engine's log-probs and gradients with transformers'; fails past the bound. Starts its own ranks."""
    from megatron_rl.parity import run

    status = run(model, tokens, layout, dtype, recompute, device, url, as_json=json)
    raise typer.Exit(status)


@app.command()
def certify(
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Default: a random one.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="such as tp=2,pp=2,ep=2; default: a grid of ten")] = None,
    recompute: Annotated[Recompute | None, typer.Option(help="default: all three, one after another")] = None,
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    device: Annotated[Device, typer.Option()] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object per layout and recomputation.")] = False,
) -> None:
    """Proves that routing replay gives each router its own rows; fails where it does not. Starts its own ranks."""
    from megatron_rl.certify import GRID, RECOMPUTE, run

    kinds = (recompute,) if recompute else RECOMPUTE
    raise typer.Exit(run(model, layout or GRID, kinds, dtype, device, as_json=json))


def _check(config: Config | SftConfig, world_size: int | None, dry_run: bool) -> tuple[Architecture, Layout]:
    """All that can be said of a configuration without torch, so that a mistake is told before anything is started."""
    if world_size is not None and not dry_run:
        raise ConfigError("--world-size: only --dry-run plans for a world; torchrun's --nproc-per-node starts one")
    try:
        arch = read_architecture(config.model.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from None
    layout = check_config(config, arch, world_size or int(os.environ.get("WORLD_SIZE", "1")))
    if isinstance(config, Config):
        check_companions(config, arch, layout)
    return arch, layout


def _show(config: Config | SftConfig, arch: Architecture, layout: Layout) -> None:
    from megatron_rl.config.show import show_layout

    print(dump_config(config))
    show_layout(layout, arch, config.engine)


def main() -> None:
    """One `error:` and exit status 2 for what the user can mend; a traceback for anything else."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        app()
    except ConfigError as error:
        if rank == 0:  # every rank finds the same
            sys.exit(_tell(error))
        # torchrun ends all ranks as soon as one leaves: rank 0 must be the first, or nobody says why.
        time.sleep(SECONDS_FOR_RANK_0)
        sys.exit(2)
    except (UserError, FileExistsError, FileNotFoundError) as error:
        sys.exit(_tell(error, f"rank {rank}: " if rank else ""))


def _tell(error: Exception, who: str = "") -> int:
    print(f"error: {who}{error}", file=sys.stderr, flush=True)
    return error.status if isinstance(error, UserError) else UserError.status
