"""The command line. What each command needs is imported when it runs, so that help and --dry-run are quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.load import check_config, dump_config, load_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import read_architecture

app = typer.Typer(
    help="Reinforcement learning of mixture-of-experts language models on Megatron-Core and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.lr=1e-5")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and layout, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")]
WorldSize = Annotated[
    int | None, typer.Option("--world-size", help="Ranks to plan for, with --dry-run; else torchrun's.")
]


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
    if dry_run:
        _show(loaded, world_size)
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
    if dry_run:
        _show(loaded, world_size)
        return
    from megatron_rl.sft import sft as run

    run(loaded, resume=resume)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory")],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 30000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    tp: Annotated[int, typer.Option()] = 1,
    max_total_tokens: Annotated[int, typer.Option(help="KV cache, in tokens")] = 65536,
) -> None:
    """Starts a stock SGLang server with the flags that its device needs; other flags go to SGLang as they are."""
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
    model: Annotated[Path, typer.Option(help="Hugging Face model directory")],
    tokens: Annotated[Path, typer.Option(help="JSONL file: one list of token ids a line")],
    layout: Annotated[list[str], typer.Option(help="such as tp=2,pp=2,ep=2; may be given several times")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    recompute: Annotated[str, typer.Option(help="none, selective or full")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    url: Annotated[str | None, typer.Option(help="Also compare a live server's log-probs.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per layout.")] = False,
) -> None:
    """Compares the engine's log-probs and gradients with transformers'; fails past the bound. Starts its own ranks."""
    from megatron_rl.parity import run

    status = run(model, tokens, layout, dtype, recompute, device, url, as_json=json)
    raise typer.Exit(status)


def _show(config: Config | SftConfig, world_size: int | None) -> None:
    from megatron_rl.config.show import show_layout

    arch = read_architecture(config.model.path)
    world = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    layout = check_config(config, arch, world)
    print(dump_config(config))
    show_layout(layout, arch)


def main() -> None:
    """One `error:` and exit status 2 for what the user can mend; a traceback for anything else."""
    try:
        app()
    except (UserError, FileExistsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
