"""The run directory: everything a run leaves behind, in one place.

    config.yaml        the frozen, resolved configuration
    versions.json      python, torch, megatron-core, transformers, sglang, megatron_rl, platform, cores
    git.json           commit, dirty flag, untracked files; git.diff holds the changes (only from a git checkout)
    history/N/         those four as an earlier start of the same run had them
    metrics.jsonl      one line per optimizer step: step, mini_batch, weight_version, time, then the metrics
    eval.jsonl         one line per evaluation on held-out prompts: step, weight_version, time, then the metrics
    checkpoints.jsonl  one line per checkpoint: step, time, and the seconds that it took
    tensorboard/       the figures of metrics.jsonl and eval.jsonl as events, over optimizer steps
    rollouts/  checkpoints/  logs/

Rank 0 creates the directory and writes it; the other ranks attach to it for its paths.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import yaml

import megatron_rl
from megatron_rl.errors import UserError
from megatron_rl.lab import provenance

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "merged_presets",
    "run_dir",
    "train.steps",
    "checkpoint",
    "eval",
    "engine.heartbeat",
    "rollout.servers",
    "rollout.concurrency",
    "rollout.deadline",
    "rollout.dynamic_sampling.oversample",
    "rollout.dynamic_sampling.max_refills",
    "optim.max_skipped",
    "critic.optim.max_skipped",
    "weights",
)
"""Keys, with all below them, that may differ on resume: how long a run goes, where and how fast, and what ends it.

Of presets only the names are free: what they set is compared, key by key. A server's dtype and flags do
change mu, but a run outlives its servers; the mismatch metrics show the change.
"""

# In the order in which they are written: only a directory with a config.yaml can be resumed.
_RECORDS = ("versions.json", "git.json", "git.diff", "config.yaml")
_TAGS = ("step", "mini_batch", "weight_version", "time")


class RunDirError(UserError):
    """A configuration that does not fit the run, or a line of its files that cannot be read."""


class RunDir:
    """Paths of a run directory and the writer of its metrics.

    A step is the number of a rollout step. Off rank 0 (`attach`) every log call does nothing.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.checkpoints_file = path / "checkpoints.jsonl"
        self._writes = writes
        self._optimizer_steps = 0
        self._events: SummaryWriter | None = None
        self._hide_events_from: int | None = None
        self._warned: set[str] = set()

    @classmethod
    def create(cls, path: Path, config_yaml: str, resume: bool) -> RunDir:
        """Starts a run in a new or empty directory, or takes up the one that is there. For rank 0 only.

        On resume call `truncate_after` with the checkpoint's step before anything is logged.
        Raises FileExistsError when the directory is not empty and `resume` is False, FileNotFoundError when
        there is nothing to resume, RunDirError when the configuration differs in more than MAY_CHANGE.
        """
        run = cls(path, writes=True)
        if resume:
            _check_resumable(path, config_yaml)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"run_dir {path} is not an empty directory. "
                "Resume the run that is in it, name another run_dir, or remove it."
            )
        for directory in (run.rollouts, run.checkpoints, run.logs):
            directory.mkdir(parents=True, exist_ok=True)
        _write_records(path, config_yaml)
        if resume:
            run._cut_files(last_step=None)
        return run

    @classmethod
    def attach(cls, path: Path) -> RunDir:
        """The directory for the other ranks, once rank 0 has created it: its paths; nothing is written."""
        return cls(path, writes=False)

    def log_metrics(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of one optimizer step; a metric that is not finite becomes null (warned once)."""
        if not self._writes:
            return
        tags = {"step": step, "mini_batch": mini_batch, "weight_version": weight_version}
        values = self._append(self.metrics_file, tags, metrics)
        self._optimizer_steps += 1
        self._plot("", values)

    def log_eval(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of one evaluation, made after `step` (0: before the first)."""
        if not self._writes:
            return
        values = self._append(self.eval_file, {"step": step, "weight_version": weight_version}, metrics)
        self._plot("eval/", values)

    def log_checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the line of the checkpoint of `step`."""
        if self._writes:
            self._append(self.checkpoints_file, {"step": step}, metrics)

    def truncate_after(self, step: int) -> None:
        """Cuts the lines of all later steps, so that the resumed run's files equal an uninterrupted one's.

        The lines of `step` itself stay, so a step's lines must be logged before its checkpoint is made.
        """
        if self._writes:
            self._cut_files(last_step=step)

    def close(self) -> None:
        """Flushes and closes the events; the next log call opens them again."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _cut_files(self, last_step: int | None) -> None:
        self.close()
        self._optimizer_steps = _cut(self.metrics_file, last_step)
        _cut(self.eval_file, last_step)
        _cut(self.checkpoints_file, last_step)
        # Of what the interrupted run had plotted, TensorBoard hides all from the next optimizer step on.
        self._hide_events_from = self._optimizer_steps + 1

    def _append(self, file: Path, tags: Mapping[str, int], metrics: Mapping[str, float]) -> dict[str, float | None]:
        reserved = [name for name in metrics if name in _TAGS]
        if reserved:
            raise ValueError(f"metric {reserved[0]!r} has the name of a tag of {file.name}: give it another")
        values = {name: self._finite(name, value, tags["step"]) for name, value in metrics.items()}
        line = orjson.dumps({**tags, "time": time.time(), **values}, option=orjson.OPT_APPEND_NEWLINE)
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
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # here: it takes over a second to import

            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._hide_events_from)
            self._hide_events_from = None
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(prefix + name, value, self._optimizer_steps)
        self._events.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl or eval.jsonl, null where a metric was not finite.

    A last line without its end is left out: its run broke off there, or is writing it now.
    Raises RunDirError that names the file and the line that is not a JSON object with a step.
    """
    return [record for record, _ in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line's record, with the offset in bytes at which the line ends."""
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


def _cut(file: Path, last_step: int | None) -> int:
    """Cuts the lines after `last_step` (None: keeps all) and a torn last line; returns how many are left."""
    if not file.exists():
        return 0
    kept = end = 0
    for record, line_end in _lines(file):
        if last_step is not None and record["step"] > last_step:
            break
        kept, end = kept + 1, line_end
    if end < file.stat().st_size:
        os.truncate(file, end)
    return kept


def _check_resumable(path: Path, config_yaml: str) -> None:
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"run_dir {path} has no config.yaml, so there is no run to resume. "
            "Start without resume, or correct the path."
        )
    with config_file.open(encoding="utf-8") as stream:
        frozen, asked = _flatten(yaml.safe_load(stream)), _flatten(yaml.safe_load(config_yaml))
    differing = [
        f"  {key}: {frozen.get(key, 'absent')} in the run, {asked.get(key, 'absent')} now"
        for key in sorted(frozen.keys() | asked.keys())
        if frozen.get(key, "absent") != asked.get(key, "absent") and not _may_change(key)
    ]
    if differing:
        raise RunDirError(
            f"run_dir {path} was started with another configuration:\n"
            + "\n".join(differing)
            + f"\nOnly these may differ on resume: {', '.join(MAY_CHANGE)}. "
            "Restore the values, or name another run_dir."
        )


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are compared as a whole."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _write_records(path: Path, config_yaml: str) -> None:
    """Writes what this start was made with; what an earlier start wrote moves to history/ if it differs."""
    new = {"versions.json": _json(provenance.versions()), "config.yaml": config_yaml.encode()}
    git = provenance.git_state(Path(megatron_rl.__file__))
    if git is not None:
        new["git.json"] = _json({"commit": git.commit, "dirty": git.dirty, "untracked": git.untracked})
        new["git.diff"] = git.diff.encode()
    old = {name: (path / name).read_bytes() for name in _RECORDS if (path / name).is_file()}
    if old == new:
        return
    if old:
        history = path / "history"
        _write_all(history / str(len(list(history.glob("*")))), old)
    _write_all(path, new)
    for name in old.keys() - new.keys():
        (path / name).unlink()


def _write_all(directory: Path, records: Mapping[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in _RECORDS:
        if name in records:
            partial = directory / f".{name}.partial"
            partial.write_bytes(records[name])
            os.replace(partial, directory / name)


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
