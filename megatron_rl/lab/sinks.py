"""Sinks of the journal: the run's own files and TensorBoard. Weights & Biases is in lab/wandb_sink.py, Prometheus in
lab/prometheus_sink.py, and the console is a sink too.

A new sink is a class with the three methods of `Sink`, and a line in loop/trainer.py that makes one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import orjson

from megatron_rl.lab.owner import Owner

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kept = Literal["metrics", "eval", "checkpoints"]
File = Literal[Kept, "steps"]
"""`steps` are lines of rollout steps, made from those of their optimizer steps; no file of the run has them."""
TAGS = ("step", "mini_batch", "weight_version", "time")
"""Names that no metric may have."""


@dataclass(frozen=True)
class Line:
    """One line of the journal."""

    file: File
    tags: Mapping[str, int]
    """`step`, which counts rollout steps; an optimizer step's line also has its mini_batch and weight_version."""
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float | None]
    """Metrics by name; None for a number that is not finite."""
    optimizer_steps: int
    """Lines of optimizer steps up to this one."""

    def named(self) -> dict[str, float]:
        """Returns the finite metrics by the names of plots, in which those of an evaluation begin with eval/."""
        prefix = "eval/" if self.file == "eval" else ""
        return {prefix + name: value for name, value in self.values.items() if value is not None}


class Sink(Protocol):
    """Takes the lines of a run, on rank 0. `write` raises OSError or OwnerError if the line is lost."""

    what: str
    """What is written, for the message if that fails."""
    directory: Path

    def write(self, line: Line) -> None: ...

    def sync(self) -> None:
        """Waits until no later crash can lose a line."""

    def close(self) -> None: ...


class JsonlSink:
    """Appends each line to DIRECTORY/{metrics,eval,checkpoints}.jsonl."""

    what = "the line"

    def __init__(self, directory: Path, owner: Owner) -> None:
        self.directory = directory
        self._owner = owner

    def write(self, line: Line) -> None:
        if line.file == "steps":
            return
        data = orjson.dumps({**line.tags, "time": line.time, **line.values}, option=orjson.OPT_APPEND_NEWLINE)
        self._owner.check()
        with self.path(line.file).open("ab") as stream:  # closed after each line: flushed, and never open while cut
            stream.write(data)

    def path(self, file: Kept) -> Path:
        return self.directory / f"{file}.jsonl"

    def sync(self) -> None:
        for file in get_args(Kept):
            if self.path(file).exists():
                with self.path(file).open("rb") as stream:
                    os.fsync(stream.fileno())

    def close(self) -> None: ...


BY_ROLLOUT_STEP = "rollout_steps"
"""Folder of TensorBoard's events over rollout steps; TensorBoard shows it as a run of its own."""


class TensorBoardSink:
    """Writes events over optimizer steps, and those of rollout steps into a folder of their own. Evaluations are in
    both."""

    what = "tensorboard"

    def __init__(self, directory: Path, hide_from: tuple[int, int] | None) -> None:
        """TensorBoard hides events of earlier starts from this (optimizer step, rollout step) on."""
        self.directory = directory
        self._hide_from = hide_from
        self._events: dict[str, SummaryWriter] = {}

    def write(self, line: Line) -> None:
        if line.file in ("metrics", "eval"):
            self._write("", line, line.optimizer_steps)
        if line.file in ("steps", "eval"):
            self._write(BY_ROLLOUT_STEP, line, line.tags["step"])

    def _write(self, folder: str, line: Line, step: int) -> None:
        # Here: it takes over a second to import.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        if folder not in self._events:
            hide_from = None if self._hide_from is None else self._hide_from[bool(folder)]
            self._events[folder] = SummaryWriter(str(self.directory / folder), purge_step=hide_from)
        # One event for the whole line: add_scalar would write each of its hundreds of numbers as an event of its own.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in line.named().items()]
        self._events[folder].file_writer.add_summary(Summary(value=values), step)  # type: ignore[attr-defined]
        self._events[folder].flush()

    def sync(self) -> None: ...

    def close(self) -> None:
        for events in self._events.values():
            events.close()
