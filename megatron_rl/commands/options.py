"""Options that several commands have, or that are more than a name and a type. They import no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from megatron_rl.config.recompute import read_recompute
from megatron_rl.config.sources import ConfigError
from megatron_rl.lab.run_records import Resume

if TYPE_CHECKING:  # it imports torch
    from megatron_rl.engine.named_checkpoint import CheckpointName

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.lr=1e-5")]
KeyVariable = Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")]

VERSIONED = ("megatron_rl", "megatron-core", "torch", "transformers", "sglang")
"""Distributions that --version names."""


def _print_versions(asked: bool) -> None:
    """Prints a line for each package, read from its metadata: nothing is imported."""
    if not asked:
        return
    for name in VERSIONED:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "not installed")
    raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions in use, and stop."),
]


def check_recompute(value: str | list[str] | None) -> str | list[str] | None:
    """Returns what it is given. Raises BadParameter."""
    for text in [value] if isinstance(value, str) else value or []:
        try:
            read_recompute(text)
        except ValueError as error:
            raise typer.BadParameter(f"found {text!r}, expected {error}") from None
    return value


Recompute = Annotated[str, typer.Option(callback=check_recompute, help="as engine.recompute, such as moe,layernorm")]

AUTO = "auto"
_ALONE = "always"


def _read_resume(value: Any) -> Resume:
    if value in (AUTO, False):
        return value
    if value == _ALONE:
        return True
    raise typer.BadParameter(f"found {value!r}, expected {AUTO} or nothing")


ResumeOption = Annotated[
    Any,
    typer.Option(
        "--resume",
        parser=_read_resume,
        metavar=f"[{AUTO}]",
        help=f"Go on from the newest complete checkpoint. {AUTO}: if run_dir has a run; else begin one.",
    ),
]
ForkOption = Annotated[
    str | None,
    typer.Option(
        "--fork", metavar="RUN@STEP", help="Begin a new run from a checkpoint of another; RUN@last: from its newest."
    ),
]


class RunCommand(typer.core.TyperCommand):
    """A command whose --resume may be followed by `auto`, and by an override as well: click would take any word that
    follows for the option's value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, joined_resume(args))


def joined_resume(args: Sequence[str]) -> list[str]:
    """Returns the arguments, with --resume and the word that belongs to it as one."""
    end = args.index("--") if "--" in args else len(args)
    joined: list[str] = []
    for word in args[:end]:
        if word == AUTO and joined and joined[-1] == f"--resume={_ALONE}":
            joined[-1] = f"--resume={AUTO}"
        else:
            joined.append(f"--resume={_ALONE}" if word == "--resume" else word)
    return [*joined, *args[end:]]


class Begins:
    """What a run begins with, as the command line says it."""

    def __init__(self, resume: Resume, fork: str | None) -> None:
        self.resume = resume
        self._fork = fork

    def __str__(self) -> str:
        words = ["--resume"] if self.resume else []
        words += [AUTO] if self.resume == AUTO else []
        return " ".join([*words, *(["--fork", self._fork] if self._fork else [])])

    @property
    def fork(self) -> CheckpointName | None:
        from megatron_rl.engine.named_checkpoint import CheckpointName

        return None if self._fork is None else CheckpointName.parse(self._fork, "--fork")

    def check(self) -> None:
        """Raises a UserError if both are given, or for a checkpoint that is not there or is damaged."""
        if self.fork is None:
            return
        if self.resume:
            raise ConfigError(
                "--fork begins a new run, and --resume goes on with the one in run_dir; give one of the two. A forked "
                "run is resumed as any other, without --fork"
            )
        self.fork.find()
