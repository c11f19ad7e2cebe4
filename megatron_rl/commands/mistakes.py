"""Mistakes in the words of a command line, told as all other errors are."""

from __future__ import annotations

import errno
from typing import Any, TypeGuard

import typer

from megatron_rl.config.sources import shown
from megatron_rl.disk import expected_of

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for wrong commands, options and arguments. It has the class in a private module."""


def explain_usage(error: Any) -> str:
    """Returns one line: the mistake, and the command that lists what there is."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    if error.ctx is None:
        return text
    listed = "commands" if error.ctx.parent is None else "options"
    return f"{text} ({error.ctx.command_path} --help lists the {listed})"


def is_too_long(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG


def explain_too_long(error: OSError) -> str:
    """Returns one line: the path that no file can have, and what a path may be."""
    expected = expected_of(str(error.filename)) or "shorter names, as this file system takes no such"
    return f"{shown(str(error.filename))}: too long for a path; expected {expected}"
