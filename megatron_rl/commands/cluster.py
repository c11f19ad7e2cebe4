"""The commands that start servers, and that write what starts a run on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.commands.options import ConfigFile, KeyVariable, Overrides
from megatron_rl.config.bounds import MOST_GPUS_OF_A_NODE, MOST_RANKS
from megatron_rl.config.schema import Device
from megatron_rl.config.servers import ServerDtype


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Hugging Face model directory")],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 30000,
    device: Annotated[Device, typer.Option()] = "auto",
    dtype: Annotated[ServerDtype, typer.Option(help="auto: the dtype in the model's config.json")] = "auto",
    tp: Annotated[int, typer.Option(min=1, max=MOST_GPUS_OF_A_NODE)] = 1,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV cache, in tokens; by default all that fit on a GPU, 65536 on a CPU")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU; default: all cores")] = None,
    api_key_env: KeyVariable = None,
    show: Annotated[bool, typer.Option("--print", help="Print SGLang's command without the key, and stop.")] = False,
) -> None:
    """Starts a stock SGLang server with the flags that its device needs; what follows -- goes to SGLang as it is."""
    from megatron_rl.models.check import check_files
    from megatron_rl.rollout.pool import read_api_key
    from megatron_rl.rollout.server import ServerOptions, shown_command
    from megatron_rl.rollout.server import serve as run

    check_files(model)
    options = ServerOptions(
        model=model,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        tp=tp,
        max_total_tokens=max_total_tokens,
        threads=threads,
        extra_flags=tuple(context.args),
        api_key=read_api_key(api_key_env, "--api-key-env") if api_key_env else None,
    )
    if show:
        print(shown_command(options))
        return
    raise typer.Exit(run(options))


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Nodes of the trainer.")] = 1,
    rollout_nodes: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_RANKS, help="Nodes of SGLang servers, filled with servers; 0: the trainer starts its own."
        ),
    ] = 0,
    gpus_per_node: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_GPUS_OF_A_NODE,
            help="GPUs of a node: one for each rank, and those of the servers that a single node starts beside its "
            "ranks; on CPUs the trainer's ranks on it.",
        ),
    ] = 8,
    slurm: Annotated[bool, typer.Option("--slurm", help="A script for sbatch.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Manifests for kubectl.")] = False,
    site: Annotated[Path | None, typer.Option(help="YAML file about the cluster: time limit, image and so on")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the files; default: they are printed.")] = None,
) -> None:
    """Writes a Slurm script, or Kubernetes manifests, that start a run and its servers on several nodes."""
    from megatron_rl.launch.cluster_files import write
    from megatron_rl.launch.cluster_job import Nodes, plan_job
    from megatron_rl.launch.site import read_site

    if slurm == kubernetes:
        raise typer.BadParameter("give one of --slurm and --kubernetes")
    known = read_site(site)
    write(plan_job(config, overrides or [], Nodes(nodes, rollout_nodes, gpus_per_node)), known, kubernetes, out)
