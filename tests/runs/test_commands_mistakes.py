"""Mistakes in the words of a command line, paths that no file can have, and output that cannot be written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from config_files import RL, write, write_model
from forks import Forks, Run

LONG = "a" * 300


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a.yaml and the model that it names."""
    write(tmp_path / "a.yaml", RL)
    write_model(tmp_path / "model")
    return tmp_path


def run(forks: Forks, directory: Path, arguments: list[str]) -> Run:
    return forks.run("-m", "megatron_rl", *arguments, directory=directory)


def run_into(stdout: int, directory: Path, arguments: list[str], unbuffered: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl", *arguments],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train"], "Missing argument 'CONFIG' (PROGRAM train --help lists the options)"),
        (["train", "a.yaml", "--dryrun"], "No such option: --dryrun"),
        (["trian", "a.yaml"], "No such command 'trian'"),
        (["--nope"], "No such option: --nope (PROGRAM --help lists the commands)"),
        (["serve", "missing"], "'missing' does not exist (PROGRAM serve --help lists"),
        (["serve", "model", "--prot", "1"], "No such option: --prot"),
        (
            ["serve", "model", "--dtype", "fp16"],
            "'fp16' is not one of 'auto', 'fp32', 'bf16' (PROGRAM serve --help lists",
        ),
        (
            ["serve", "model", "--device", "tpu"],
            "'tpu' is not one of 'auto', 'cpu', 'cuda' (PROGRAM serve --help lists",
        ),
        (["parity", "--model", "model", "--tokens", "a.yaml"], "Missing option '--layout'"),
        (["launch", "a.yaml"], "Invalid value: give one of --slurm and --kubernetes (PROGRAM launch --help lists"),
        (["train", "a.yaml", "--resume=never"], "Invalid value for '--resume': found 'never', expected auto or not"),
    ],
)
def test_wrong_command_line_usage_gives_one_clear_error(
    forks: Forks, directory: Path, arguments: list[str], error: str
) -> None:
    done = run(forks, directory, arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert error in re.sub("python[0-9.]* -m megatron_rl", "PROGRAM", line)


def test_no_arguments_print_the_help(forks: Forks, directory: Path) -> None:
    done = run(forks, directory, [])
    assert done.returncode == 0
    assert "Trains a policy by RL" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", LONG],
        ["report", ".", "--out", LONG],
        ["inspect", LONG, "--step", "1"],
        ["inspect", ".", "--step", "1", "--out", LONG],
        ["tokens", LONG, "--out", "t.parquet"],
        ["tokens", ".", "--out", LONG],
        ["export", LONG, "out"],
        ["export", ".", LONG],
        ["launch", "a.yaml", "--slurm", "--out", LONG],
        ["train", "a.yaml", f"run_dir={LONG}"],
        ["study", LONG],
    ],
)
def test_a_path_that_no_file_can_have_gives_one_error(forks: Forks, directory: Path, arguments: list[str]) -> None:
    before = sorted(directory.iterdir())
    done = run(forks, directory, arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert LONG[:100] in done.stderr
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "a.yaml", "--dry-run"]])
def test_output_that_cannot_be_written_gives_one_error(directory: Path, arguments: list[str], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_into(full.fileno(), directory, arguments, unbuffered)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: no space left on device; send it to another file\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "a.yaml", "--dry-run"]])
def test_a_pipe_that_is_closed_early_is_no_error(directory: Path, arguments: list[str], unbuffered: str) -> None:
    read, write_end = os.pipe()
    os.close(read)
    try:
        done = run_into(write_end, directory, arguments, unbuffered)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")
