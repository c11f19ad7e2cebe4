"""Sinks of the journal: the run's own files and TensorBoard. Weights & Biases is in lab/wandb_sink.py.

A new sink is a class with the three methods of `Sink`, and a line in loop/trainer.py that makes one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import orjson

from megatron_rl.lab.owner import Owner

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

File = Literal["metrics", "eval", "checkpoints"]
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
        data = orjson.dumps({**line.tags, "time": line.time, **line.values}, option=orjson.OPT_APPEND_NEWLINE)
        self._owner.check()
        with self.path(line.file).open("ab") as stream:  # closed after each line: flushed, and never open while cut
            stream.write(data)

    def path(self, file: File) -> Path:
        return self.directory / f"{file}.jsonl"

    def sync(self) -> None:
        for file in ("metrics", "eval", "checkpoints"):
            if self.path(file).exists():
                with self.path(file).open("rb") as stream:
                    os.fsync(stream.fileno())

    def close(self) -> None: ...


class TensorBoardSink:
    """Writes the metrics of optimizer steps and evaluations as events, over optimizer steps."""

    what = "tensorboard"

    def __init__(self, directory: Path, hide_from: int | None) -> None:
        """TensorBoard hides events of earlier starts from the optimizer step `hide_from` on."""
        self.directory = directory
        self._hide_from = hide_from
        self._events: SummaryWriter | None = None

    def write(self, line: Line) -> None:
        if line.file == "checkpoints":
            return
        # Here: it takes over a second to import.
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        if self._events is None:
            self._events = SummaryWriter(str(self.directory), purge_step=self._hide_from)
        # One event for the whole line: add_scalar would write each of its hundreds of numbers as an event of its own.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in line.named().items()]
        self._events.file_writer.add_summary(Summary(value=values), line.optimizer_steps)  # type: ignore[attr-defined]
        self._events.flush()

    def sync(self) -> None: ...

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
