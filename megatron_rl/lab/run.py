"""The run directory, which holds everything that a run leaves behind.

    owner-N.json       the process that writes here, or that wrote last (lab/owner.py)
    run.json           the run's id, which each of its checkpoints carries
    config.yaml        the frozen, resolved configuration
    versions.json      python, torch, megatron-core, transformers, sglang, megatron_rl, platform, cores
    git.json           commit, dirty flag, untracked files; git.diff holds the changes (only from a git checkout)
    history/N/         files that a resume moved here: the four records above if they differ, lines, rollouts and
                       tokens of steps after the checkpoint, damaged checkpoints
    metrics.jsonl      one line per optimizer step: step, mini_batch, weight_version, time, then the metrics
    eval.jsonl         one line per evaluation on held-out prompts: step, weight_version, time, then the metrics
    checkpoints.jsonl  one line per checkpoint: step, time, and the seconds that it took
    tensorboard/       the figures of metrics.jsonl and eval.jsonl as events, over optimizer steps; in rollout_steps/
                       over rollout steps
    wandb/             the same for Weights & Biases, if lab.wandb is set
    tokens/            values of each token of the steps that lab.record_steps names
    pending/           judged groups that no checkpoint has yet (rollout/ledger.py)
    logs/              what each rank has logged (lab/rank_log.py), and each server
    rollouts/  checkpoints/

Rank 0 opens and writes the directory; the other ranks attach to it for its paths. lab/journal.py makes the lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.disk import sync_directory, writes
from megatron_rl.errors import FileInTheWayError
from megatron_rl.lab.owner import Owner, refuse_living
from megatron_rl.lab.run_records import (
    RECORDS,
    RUN_FILE,
    History,
    RunDirError,
    check_resumable,
    name_run,
    read_run_id,
    write_records,
)
from megatron_rl.lab.sinks import JsonlSink, Sink, TensorBoardSink

# Files that a start may leave if it ended before its run began. They do not block the next start.
_LEFTOVERS = re.compile(
    r"owner-\d+\.json|\..*|logs|rollouts|pending|checkpoints|" + "|".join(map(re.escape, (RUN_FILE, *RECORDS[:-1])))
)
_OF_STEP = re.compile(r"step-(\d+)-.*")


class RunDir:
    """Paths of a run directory, and its state before and after a run."""

    def __init__(
        self,
        path: Path,
        owner: Owner | None,
        config_yaml: str = "",
        *,
        resumes: bool = False,
        is_new: bool = False,
    ) -> None:
        """`is_new`: the directory did not exist before."""
        self.path = path
        self.id = ""
        """The run's id, kept by a resume. Rank 0 knows it after `begin`, or after `open` with `resume`."""
        self.rollouts = path / "rollouts"
        self.pending = path / "pending"
        self.tokens = path / "tokens"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.checkpoints_file = path / "checkpoints.jsonl"
        self.optimizer_steps = 0
        """Optimizer steps with a line in metrics.jsonl, after `begin`."""
        self._owner = owner
        self._config_yaml = config_yaml
        self._resumes = resumes
        self._began = False
        self._is_new = is_new

    @property
    def _files(self) -> list[Path]:
        return [f for f in (self.metrics_file, self.eval_file, self.checkpoints_file) if f.exists()]

    @classmethod
    def open(cls, path: Path, config_yaml: str, resume: bool) -> RunDir:
        """Takes a new or empty directory, or with `resume` the run that is in it. Only rank 0 calls it.

        No file of the run changes before `begin`; `close` without `begin` leaves the directory as it was.
        Raises FileInTheWayError if the directory is not empty and `resume` is False, and MissingFileError if there is
        nothing to resume. Raises RunDirError if the configuration differs in more than MAY_CHANGE, OwnerError if
        another process writes there, and DiskError if this process cannot write.
        """
        if resume:
            check_resumable(path, config_yaml)
        else:
            _check_empty(path)
        with writes(f"run_dir {path}", path):
            is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, Owner.take(path), config_yaml, resumes=resume, is_new=is_new)
        try:
            if resume:  # check again: another process may have written until now
                check_resumable(path, config_yaml)
                run.id = read_run_id(path)
                for file in run._files:
                    read_metrics(file)
            else:
                _check_empty(path)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def attach(cls, path: Path) -> RunDir:
        """Gives the other ranks the paths of the directory that rank 0 has opened; it writes nothing."""
        return cls(path, None)

    def begin(self, last_step: int = -1, damaged: Sequence[Path] = ()) -> list[Sink]:
        """Prepares the directory for this start, and returns what writes lines into it. Only its owner calls it.

        A resumed run continues after `last_step` (-1: without a checkpoint). Later lines, rollouts and tokens move to
        history/, so that the files equal the files of an uninterrupted run. The `damaged` checkpoints move there too.
        The lines of `last_step` itself stay, so a step's lines must be logged before its checkpoint is made.
        """
        assert self._owner is not None
        history = History(self.path)
        with writes(f"run_dir {self.path}", self.path):
            for directory in (self.rollouts, self.checkpoints, self.logs):
                directory.mkdir(parents=True, exist_ok=True)
            hide_from = None
            if self._resumes:
                self.optimizer_steps = self._take_out(last_step, damaged, history)
                # TensorBoard hides the interrupted run's later events.
                hide_from = self.optimizer_steps + 1, max(last_step, 0) + 1
            else:
                self.id = name_run(self.path)
                shutil.rmtree(self.pending, ignore_errors=True)  # of a start that failed
            write_records(self.path, self._config_yaml, history)
            self._owner.settle()
        self._began = True
        return [JsonlSink(self.path, self._owner), TensorBoardSink(self.path / "tensorboard", hide_from)]

    def refuses_step_0(self) -> str:
        """Returns why a resume without any checkpoint would lose work; empty if nothing would be lost. Until there has
        been one, pending/ has all groups, so the same steps are made again."""
        lines, checkpoints = (
            len(read_metrics(file)) if file.exists() else 0 for file in (self.metrics_file, self.checkpoints_file)
        )
        if not lines or (not checkpoints and any(self.pending.glob("group-*"))):
            return ""
        return (
            f"run_dir {self.path} has no whole checkpoint, but {lines} lines in metrics.jsonl: to resume would be to "
            "start again at step 0 and to lose them. Start a new run in another run_dir, or put a checkpoint back"
        )

    def close(self) -> None:
        """Releases the directory. Close the journal first."""
        if self._owner is None:
            return
        owner, self._owner = self._owner, None
        with contextlib.suppress(OSError):  # a full disk: the next start finds the process gone
            if self._began:
                owner.release()
                return
            owner.withdraw()
            if not self._resumes:
                for directory in (self.logs, *([self.path] if self._is_new else [])):
                    if directory.is_dir() and not any(directory.iterdir()):
                        directory.rmdir()

    def _take_out(self, last_step: int, damaged: Sequence[Path], history: History) -> int:
        """Returns the number of optimizer steps that keep their lines."""
        kept = {file: _cut(file, last_step, history) for file in self._files}
        for directory in (self.rollouts, self.tokens):
            for file in sorted(directory.iterdir()) if directory.is_dir() else ():
                match = _OF_STEP.fullmatch(file.name)
                if match and int(match[1]) > last_step:
                    history.take(file, directory.name)
        for checkpoint in damaged:
            history.take(checkpoint, "checkpoints")
        sync_directory(self.checkpoints)
        return kept.get(self.metrics_file, 0)


def check_run_dir(path: Path, config_yaml: str) -> str:
    """Says what a start would find in the directory, and changes nothing. Raises as RunDir.open does, but for an owner
    on another machine."""
    if path.is_dir():
        refuse_living(path)
    if (path / "config.yaml").is_file():
        check_resumable(path, config_yaml)
        return f"{path} holds a run of this configuration, which --resume goes on with"
    _check_empty(path)
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunDirError(f"run_dir {path}: nothing can be written into {there}; name another run_dir")
    return f"{path} is free, and can be written"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl or eval.jsonl; a metric that was not finite is None.

    Omits a last line without a line end: the run was interrupted there, or is writing it. Raises RunDirError, which
    names the file and the line, if a line is not a JSON object of numbers with a step.
    """
    return [record for record, _ in _lines(path)]


_NUMBERS = (int, float, type(None))  # None: it was not finite


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the record of each complete line, and the byte offset at which the line ends."""
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RunDirError(f"{path}, line {number}: not JSON ({error}). Remove the line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise RunDirError(f"{path}, line {number}: expected an object with an integer `step`. Remove it.")
            for name, value in record.items():
                if type(value) not in _NUMBERS or (name == "mini_batch" and not isinstance(value, int)):
                    found = repr(value)[:40]
                    raise RunDirError(f"{path}, line {number}: {name[:80]} is {found}; expected a number. Remove it.")
            end += len(line)
            yield record, end


def _cut(file: Path, last_step: int, history: History) -> int:
    """Moves the lines after `last_step`, and a torn last line, to history/; returns how many are left."""
    kept = end = 0
    for record, line_end in _lines(file):
        if record["step"] > last_step:
            break
        kept, end = kept + 1, line_end
    if end < file.stat().st_size:
        with file.open("rb") as stream:
            stream.seek(end)
            history.keep(file.name, stream.read())
        os.truncate(file, end)
    return kept


def _check_empty(path: Path) -> None:
    """Raises FileInTheWayError unless the directory holds only what a start leaves that ended before its run began."""
    if not path.exists():
        return
    if not path.is_dir() or any(not _is_leftover(entry) for entry in path.iterdir()):
        raise FileInTheWayError(
            f"run_dir {path} is not an empty directory. "
            "Resume the run that is in it, name another run_dir, or remove it."
        )


def _is_leftover(entry: Path) -> bool:
    if not _LEFTOVERS.fullmatch(entry.name):
        return False
    return entry.name not in ("rollouts", "checkpoints") or not any(entry.iterdir())
