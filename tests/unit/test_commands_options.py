"""Options that say what a run begins with, as the command line reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from megatron_rl.commands.options import Begins, ForkOption, ResumeOption, RunCommand
from megatron_rl.config.sources import ConfigError
from megatron_rl.engine.named_checkpoint import CheckpointName

app = typer.Typer()
found: list[Any] = []


@app.callback()
def group() -> None:
    """Makes `train` one of several commands."""


@app.command(cls=RunCommand)
def train(
    config: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    resume: ResumeOption = False,
    fork: ForkOption = None,
) -> None:
    found.append((config, overrides or [], resume, fork))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.yaml", ("a.yaml", [], False, None)),
        ("a.yaml --resume", ("a.yaml", [], True, None)),
        ("a.yaml --resume train.steps=5", ("a.yaml", ["train.steps=5"], True, None)),
        ("a.yaml --resume auto", ("a.yaml", [], "auto", None)),
        ("--resume auto a.yaml", ("a.yaml", [], "auto", None)),
        ("--resume a.yaml", ("a.yaml", [], True, None)),
        ("a.yaml --resume auto train.steps=5", ("a.yaml", ["train.steps=5"], "auto", None)),
        ("a.yaml train.steps=5 --resume=auto", ("a.yaml", ["train.steps=5"], "auto", None)),
        ("a.yaml --fork runs/a@3 seed=1", ("a.yaml", ["seed=1"], False, "runs/a@3")),
    ],
)
def test_resume_takes_the_word_auto_and_no_other(words: str, expected: tuple[Any, ...]) -> None:
    found.clear()
    result = CliRunner().invoke(app, ["train", *words.split()])
    assert result.exit_code == 0, result.output
    assert found == [expected]


def test_another_value_of_resume_is_an_error() -> None:
    result = CliRunner().invoke(app, ["train", "a.yaml", "--resume=never"])
    assert result.exit_code == 2
    assert "found 'never', expected auto or nothing" in result.output


def test_ranks_tell_each_other_what_a_run_begins_with() -> None:
    said = [Begins(False, None), Begins(True, None), Begins("auto", None), Begins(False, "a@1")]
    assert list(map(str, said)) == ["", "--resume", "--resume auto", "--fork a@1"]


def test_a_run_is_not_forked_and_resumed_at_once() -> None:
    for both in (Begins(True, "runs/a@3"), Begins("auto", "runs/a@3")):
        with pytest.raises(ConfigError, match="--fork begins a new run, and --resume goes on with"):
            both.check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a@3", (Path("runs/a"), 3)),
        ("runs/a@last", (Path("runs/a"), None)),
        ("runs/a@b@12", (Path("runs/a@b"), 12)),
        ("runs/a", (Path("runs/a"), None)),
    ],
)
def test_a_checkpoint_is_named_by_run_and_step(text: str, expected: tuple[Path, int | None]) -> None:
    name = CheckpointName.parse(text, "RUN", needs_step=False)
    assert (name.run, name.step) == expected


@pytest.mark.parametrize("text", [f"{'a' * 300}@3", f"runs/{'a' * 300}@last", "runs/" * 1000 + "@3"])
def test_a_checkpoint_of_a_run_whose_name_is_too_long_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--fork: found \".*characters\), expected a path (whose names have|of) at most"
    ):
        CheckpointName.parse(text, "--fork")


@pytest.mark.parametrize("text", ["runs/a", "runs/a@", "runs/a@first", "@3", "runs/a@-1"])
def test_a_fork_needs_a_step(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--fork: found '{text}', expected RUN_DIR@STEP such as runs/first@20"):
        CheckpointName.parse(text, "--fork")
