"""The commands that read what runs have written. What each needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.ranks.agreement import tell

commands = typer.Typer()


@commands.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN|STUDY...", help="run_dir of a run, directory of a study")],
    out: Annotated[Path | None, typer.Option(help="Directory of the report; default: RUN/report.")] = None,
) -> None:
    """Writes a page about runs and studies, one HTML file that needs no network, and its figures as PNG."""
    from megatron_rl.report.command import run

    print(run(paths, out))


@commands.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run_dir of a run of `train`")],
    step: Annotated[int, typer.Option(min=1, help="Rollout step, from 1.")],
    responses: Annotated[int, typer.Option(min=1, help="Responses shown, the worst of each measure.")] = 16,
    model: Annotated[Path | None, typer.Option(help="Directory of the tokenizer; default: model.path.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Directory of the rollouts; default: the run's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the page; default: RUN/report.")] = None,
) -> None:
    """Writes a page of a step's responses, with tokens coloured by ratio, mismatch, log-prob or expert change."""
    from megatron_rl.report.command import run_inspect
    from megatron_rl.report.inspected import InspectOptions

    print(run_inspect(run, InspectOptions(step, responses, model, rollouts), out))


@commands.command()
def tokens(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run_dir of a run of `train`")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Parquet file to write")],
    step: Annotated[int | None, typer.Option(min=1, help="Only this rollout step; default: all recorded ones.")] = None,
    model: Annotated[Path | None, typer.Option(help="Directory of the tokenizer; default: model.path.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Directory of the rollouts; default: the run's.")] = None,
) -> None:
    """Writes one Parquet file with a row a token (lab.record_steps): log-probs, ratio, advantage, entropy, experts."""
    from megatron_rl.report.token_export import export_tokens

    done = export_tokens(run, out, step, model=model, rollouts=rollouts)
    tell(done.notes)
    print(f"{out}: {done.count} tokens")
