"""The run directory, which holds everything that a run leaves behind.

    owner-N.json       the process that writes here, or that wrote last (lab/owner.py)
    run.json           the run's id, which each of its checkpoints carries
    config.yaml        the frozen, resolved configuration
    versions.json      python, torch, megatron-core, transformers, sglang, megatron_rl, platform, cores
    git.json           commit, dirty flag, untracked files; git.diff holds the changes (only from a git checkout)
    history/N/         files that a resume moved here: the four records above if they differ, lines and rollouts of
                       steps after the checkpoint, damaged checkpoints
    metrics.jsonl      one line per optimizer step: step, mini_batch, weight_version, time, then the metrics
    eval.jsonl         one line per evaluation on held-out prompts: step, weight_version, time, then the metrics
    checkpoints.jsonl  one line per checkpoint: step, time, and the seconds that it took
    tensorboard/       the figures of metrics.jsonl and eval.jsonl as events, over optimizer steps
    rollouts/  checkpoints/  logs/

Rank 0 opens and writes the directory; the other ranks attach to it for its paths.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_rl.disk import explain, sync_directory, writes
from megatron_rl.errors import FileInTheWayError
from megatron_rl.lab.owner import Owner, OwnerError
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

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_TAGS = ("step", "mini_batch", "weight_version", "time")
# Files that a start may leave if it ended before its run began. They do not block the next start.
_LEFTOVERS = re.compile(
    r"owner-\d+\.json|\..*|logs|rollouts|checkpoints|" + "|".join(map(re.escape, (RUN_FILE, *RECORDS[:-1])))
)
_ROLLOUTS = re.compile(r"step-(\d+)-.*")


class RunDir:
    """Paths of a run directory and the writer of its metrics.

    `step` is the number of a rollout step. On ranks other than 0 (`attach`) log calls do nothing.
    """

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
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.checkpoints_file = path / "checkpoints.jsonl"
        self.failure = ""
        """Why the first failed write failed, in words for the user; empty if all writes succeeded."""
        self._owner = owner
        self._config_yaml = config_yaml
        self._resumes = resumes
        self._began = False
        self._is_new = is_new
        self._optimizer_steps = 0
        self._events: SummaryWriter | None = None
        self._hide_events_from: int | None = None
        self._warned: set[str] = set()

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

    def begin(self, last_step: int = -1, damaged: Sequence[Path] = ()) -> None:
        """Prepares the directory for this start. Only its owner calls it, before anything is logged.

        A resumed run continues after `last_step` (-1: without a checkpoint). Later lines and rollouts move to history/,
        so that the files equal the files of an uninterrupted run. The `damaged` checkpoints move there too. The lines
        of `last_step` itself stay, so a step's lines must be logged before its checkpoint is made.
        """
        assert self._owner is not None
        history = History(self.path)
        with writes(f"run_dir {self.path}", self.path):
            for directory in (self.rollouts, self.checkpoints, self.logs):
                directory.mkdir(parents=True, exist_ok=True)
            if self._resumes:
                self._take_out(last_step, damaged, history)
            else:
                self.id = name_run(self.path)
            write_records(self.path, self._config_yaml, history)
            self._owner.settle()
        self._began = True

    def refuses_step_0(self) -> str:
        """Returns why a resume without any checkpoint would lose work; empty if nothing would be lost."""
        lines = len(read_metrics(self.metrics_file)) if self.metrics_file.exists() else 0
        if not lines:
            return ""
        return (
            f"run_dir {self.path} has no whole checkpoint, but {lines} lines in metrics.jsonl: to resume would be to "
            "start again at step 0 and to lose them. Start a new run in another run_dir, or put a checkpoint back"
        )

    def log_metrics(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of one optimizer step; a metric that is not finite becomes null (warned once)."""
        if self._owner is None:
            return
        tags = {"step": step, "mini_batch": mini_batch, "weight_version": weight_version}
        values = self._append(self.metrics_file, tags, metrics)
        self._optimizer_steps += 1
        self._plot("", values)

    def log_eval(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of one evaluation, made after `step` (0: before the first)."""
        if self._owner is None:
            return
        values = self._append(self.eval_file, {"step": step, "weight_version": weight_version}, metrics)
        self._plot("eval/", values)

    def log_checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of the checkpoint of `step`."""
        if self._owner is not None:
            self._append(self.checkpoints_file, {"step": step}, metrics)

    def sync(self) -> None:
        """Waits until all lines are on the disk, so that no checkpoint outlives the lines before it. Raises OSError."""
        if self._owner is None:
            return
        for file in self._files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())

    def close(self) -> None:
        """Closes the events and releases the directory. Nothing can be logged afterwards."""
        self._close_events()
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

    def _close_events(self) -> None:
        if self._events is not None:
            with self._noting("tensorboard", self.path / "tensorboard"):
                self._events.close()
            self._events = None

    def _take_out(self, last_step: int, damaged: Sequence[Path], history: History) -> None:
        for file in self._files:
            kept = _cut(file, last_step, history)
            if file == self.metrics_file:
                self._optimizer_steps = kept
        for file in sorted(self.rollouts.iterdir()):
            match = _ROLLOUTS.fullmatch(file.name)
            if match and int(match[1]) > last_step:
                history.take(file, "rollouts")
        for checkpoint in damaged:
            history.take(checkpoint, "checkpoints")
        sync_directory(self.checkpoints)
        # TensorBoard hides the interrupted run's events from the next optimizer step on.
        self._hide_events_from = self._optimizer_steps + 1

    @contextlib.contextmanager
    def _noting(self, what: str, path: Path) -> Iterator[None]:
        """Records a failed write in `failure` instead of raising: all ranks must hear of it before this rank ends."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{what} was not written: {explain(error, path)}"
        except OwnerError as error:
            self.failure = self.failure or str(error)

    def _append(self, file: Path, tags: Mapping[str, int], metrics: Mapping[str, float]) -> dict[str, float | None]:
        reserved = [name for name in metrics if name in _TAGS]
        if reserved:
            raise ValueError(f"metric {reserved[0]!r} has the name of a tag of {file.name}: give it another")
        values = {name: self._finite(name, value, tags["step"]) for name, value in metrics.items()}
        line = orjson.dumps({**tags, "time": time.time(), **values}, option=orjson.OPT_APPEND_NEWLINE)
        with self._noting(f"the line of step {tags['step']} in {file.name}", file):
            assert self._owner is not None
            self._owner.check()
            with file.open("ab") as stream:  # closed after each line: flushed, and never open while it is cut
                stream.write(line)
        return values

    def _finite(self, name: str, value: float, step: int) -> float | None:
        # float() also takes the scalars of NumPy and torch.
        number = int(value) if isinstance(value, int) else float(value)
        if math.isfinite(number):
            return number
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "metric %s is %s at step %d: JSON has no such number, so it is written as null (said once)",
                name,
                number,
                step,
            )
        return None

    def _plot(self, prefix: str, values: Mapping[str, float | None]) -> None:
        if self.failure:
            return
        with self._noting("tensorboard", self.path / "tensorboard"):
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter  # here: it takes over a second to import

                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._hide_events_from)
                self._hide_events_from = None
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(prefix + name, value, self._optimizer_steps)
            self._events.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl or eval.jsonl; a metric that was not finite is None.

    Omits a last line without a line end: the run was interrupted there, or is writing it. Raises RunDirError, which
    names the file and the line, if a line is not a JSON object with a step.
    """
    return [record for record, _ in _lines(path)]


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
