"""The run directory, which holds everything that a run leaves behind.

    owner-N.json       the process that writes here, or that wrote last (lab/owner.py)
    run.json           the run's id, which each of its checkpoints carries
    config.yaml        the frozen, resolved configuration
    versions.json      python, torch, megatron-core, transformers, sglang, megatron_rl, platform, cores
    git.json           commit, dirty flag, untracked files; git.diff holds the changes (only from a git checkout)
    changes.jsonl      one line per key that a resume changed: step, time, key, old, new (lab/changes.py)
    fork.json          the checkpoint of another run that this one began from, and the keys that differ
    ended.json         the step after which the run wrote its models; a resume with more steps deletes it
    history/N/         files that a resume moved here: the records of its start if they differ, lines, rollouts and
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
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.disk import sync_directory, write_durably, writes
from megatron_rl.errors import FileInTheWayError
from megatron_rl.lab.changes import ChangedKey, read_changes, record_changes
from megatron_rl.lab.owner import Owner, refuse_living
from megatron_rl.lab.run_records import (
    RECORDS,
    RUN_FILE,
    History,
    Resume,
    RunDirError,
    check_resumable,
    flat_config,
    name_run,
    read_frozen,
    read_run_id,
    write_records,
)
from megatron_rl.lab.sinks import JsonlSink, Sink, TensorBoardSink

# Files that a start may leave if it ended before its run began. They do not block the next start.
FORK_FILE, ENDED_FILE = "fork.json", "ended.json"
_LEFTOVERS = re.compile(
    r"owner-\d+\.json|\..*|logs|weights|wandb|rollouts|pending|checkpoints|"
    + "|".join(map(re.escape, (RUN_FILE, FORK_FILE, *RECORDS[:-1])))
)
_OF_STEP = re.compile(r"step-(\d+)-.*")
_CHECKPOINT = re.compile(r"step-(\d+)")
_OWNER = re.compile(r"\.?owner-")


class RunDir:
    """Paths of a run directory, and its state before and after a run."""

    def __init__(self, path: Path, owner: Owner | None, config_yaml: str = "") -> None:
        self.path = path
        self.id = ""
        """The run's id, kept by a resume. Rank 0 knows it after `open`."""
        self.resumes = False
        """Whether this start goes on with a run; `open` decides, and rank 0 tells the others."""
        self.origin: Mapping[str, Any] | None = None
        """What fork.json says of the checkpoint of another run that this run began from; None for other runs."""
        self.changes: list[ChangedKey] = []
        """What this resume changes of the configuration, after `begin`."""
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
        self._may_start_again = False
        self._began = False
        self._is_new = False
        self._made = False  # whether all that is in the directory is this start's

    @property
    def _files(self) -> list[Path]:
        return [f for f in (self.metrics_file, self.eval_file, self.checkpoints_file) if f.exists()]

    @classmethod
    def open(cls, path: Path, config_yaml: str, resume: Resume) -> RunDir:
        """Takes a new or empty directory, or with `resume` the run that is in it. Only rank 0 calls it.

        No file of the run changes before `begin`; `close` without `begin` leaves the directory as it was.
        Raises FileInTheWayError if the directory is not empty and no run is resumed, and MissingFileError if there is
        nothing to resume. Raises RunDirError if the configuration differs in more than MAY_CHANGE, OwnerError if
        another process writes there, and DiskError if this process cannot write.
        """
        _check(path, config_yaml, resume)
        with writes(f"run_dir {path}", path):
            is_new, is_empty = not path.exists(), not (path.is_dir() and any(path.iterdir()))
            path.mkdir(parents=True, exist_ok=True)
            try:
                owner = Owner.take(path)
            except BaseException:
                if is_new:
                    with contextlib.suppress(OSError):  # another process may have taken it
                        path.rmdir()
                raise
        run = cls(path, owner, config_yaml)
        run._is_new, run._may_start_again = is_new, resume == "auto"
        try:
            # Check again: another process may have written until now.
            run.resumes = _check(path, config_yaml, resume)
            if run.resumes:
                run.id = read_run_id(path)
                run.origin = read_origin(path)
                read_changes(path)
                for file in run._files:
                    read_metrics(file)
            else:
                run.id = uuid.uuid4().hex
                run._made = is_empty
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
            if self.resumes:
                self.optimizer_steps = self._take_out(last_step, damaged, history)
                # TensorBoard hides the interrupted run's later events.
                hide_from = self.optimizer_steps + 1, max(last_step, 0) + 1
                (self.path / ENDED_FILE).unlink(missing_ok=True)
                frozen, asked = read_frozen(self.path), flat_config(self._config_yaml)
                # Before config.yaml, so that no change is lost if the process dies between the two.
                self.changes = record_changes(self.path, max(last_step, self.first_step), frozen, asked, history)
            else:
                name_run(self.path, self.id)
                shutil.rmtree(self.pending, ignore_errors=True)  # of a start that failed
                (self.path / FORK_FILE).unlink(missing_ok=True)
                if self.origin is not None:
                    _write_record(self.path / FORK_FILE, self.origin)
            write_records(self.path, self._config_yaml, history)
            self._owner.settle()
        self._began = True
        return [JsonlSink(self.path, self._owner), TensorBoardSink(self.path / "tensorboard", hide_from)]

    @property
    def first_step(self) -> int:
        """The step after which the run began: 0, or that of the checkpoint that it was forked from."""
        return self.origin["step"] if self.origin else 0

    def end(self, step: int, models: Sequence[str]) -> None:
        """Records that the run has written its `models` after `step`. Raises OSError."""
        _write_record(self.path / ENDED_FILE, {"step": step, "models": list(models)})

    @property
    def ended_after(self) -> int | None:
        """The step after which the run to resume has ended, if its models are there. Whoever deletes the last
        checkpoints, and leaves others, wants to go on from these: then it has not ended."""
        ended = _read_record(self.path / ENDED_FILE) if self.resumes else None
        found = [match for each in self.checkpoints.glob("step-*") if (match := _CHECKPOINT.fullmatch(each.name))]
        newest = max((int(match[1]) for match in found), default=None)
        if ended is None or (newest is not None and newest < ended["step"]):
            return None
        step: int = ended["step"]
        return step if all((self.path / model).is_dir() for model in ended.get("models", ())) else None

    def refuses_step_0(self, had_checkpoint: bool = False) -> str:
        """Returns why a resume without any whole checkpoint would lose work; empty if nothing would be lost.

        Until there has been a checkpoint, pending/ has all groups, so the same steps are made again. A start that was
        to begin the run or to go on with it makes them again without groups too: there is nothing else to go on from,
        and the lines move to history/. `had_checkpoint`: whether there is one that is damaged.
        """
        lines, logged = (
            len(read_metrics(file)) if file.exists() else 0 for file in (self.metrics_file, self.checkpoints_file)
        )
        may_repeat = self._may_start_again or any(self.pending.glob("group-*"))
        if not lines or (not logged and not had_checkpoint and may_repeat):
            return ""
        return (
            f"run_dir {self.path} has no whole checkpoint, but {lines} lines in metrics.jsonl: to resume would be to "
            f"start again at step {self.first_step} and to lose them. Start a new run in another run_dir, or put a "
            "checkpoint back"
        )

    def close(self) -> None:
        """Releases the directory. Close the journal first. If the run has not begun, the directory is left as it was:
        a new one is removed, and the logs in it, if there are any, are kept elsewhere."""
        if self._owner is None:
            return
        owner, self._owner = self._owner, None
        with contextlib.suppress(OSError):  # a full disk: the next start finds the process gone
            if self._began:
                owner.release()
                return
            if self._made:
                self._remove_leftovers()
            owner.withdraw()
            if self._is_new:
                self.path.rmdir()  # fails if another process has taken it by now

    def _remove_leftovers(self) -> None:
        """Removes what a start that has not begun its run has made in an empty directory, but for the owner's file."""
        if self.logs.is_dir() and any(self.logs.iterdir()):
            kept = tempfile.mkdtemp(prefix="megatron-rl-logs-")
            shutil.copytree(self.logs, kept, dirs_exist_ok=True)
            print(f"the run has not begun: {self.logs} is now {kept}", file=sys.stderr, flush=True)
        for entry in self.path.iterdir():
            if not _OWNER.match(entry.name) and (_LEFTOVERS.fullmatch(entry.name) or entry.name in RECORDS):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

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
    if _check(path, config_yaml, "auto"):
        return f"{path} holds a run of this configuration, which --resume goes on with"
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunDirError(f"run_dir {path}: nothing can be written into {there}; name another run_dir")
    return f"{path} is free, and can be written"


def read_origin(run_dir: Path) -> dict[str, Any] | None:
    """Returns what fork.json says of the checkpoint of another run that a run began from; None for other runs. Raises
    RunDirError if it is damaged."""
    return _read_record(run_dir / FORK_FILE)


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


def _check(path: Path, config_yaml: str, resume: Resume) -> bool:
    """Returns whether a start goes on with the run in the directory. Raises what `open` does."""
    resumes = (path / "config.yaml").is_file() if resume == "auto" else resume
    if resumes:
        check_resumable(path, config_yaml)
    else:
        _check_empty(path)
    return resumes


def _check_empty(path: Path) -> None:
    """Raises FileInTheWayError unless the directory holds only what a start leaves that ended before its run began."""
    if not path.exists():
        return
    strangers = sorted(e.name for e in path.iterdir() if not _is_leftover(e)) if path.is_dir() else []
    if all((path / name).is_file() for name in (RUN_FILE, "config.yaml")):
        raise FileInTheWayError(
            f"run_dir {path} is not an empty directory: a run is in it. Go on with that run by --resume, name another "
            "run_dir, or remove it."
        )
    if strangers or not path.is_dir():
        found = f": {', '.join(strangers[:3])} is in it" if strangers else ""
        raise FileInTheWayError(f"run_dir {path} is not an empty directory{found}. Name another run_dir, or remove it.")


def _is_leftover(entry: Path) -> bool:
    if not _LEFTOVERS.fullmatch(entry.name):
        return False
    return entry.name not in ("rollouts", "checkpoints") or not any(entry.iterdir())


def _write_record(file: Path, content: Mapping[str, Any]) -> None:
    write_durably(file, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _read_record(file: Path) -> dict[str, Any] | None:
    """Returns what fork.json or ended.json says; None if there is none. Raises RunDirError if it is damaged."""
    try:
        content = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise RunDirError(f"{file}: damaged: expected an object with an integer `step`; restore the file")
    return content
