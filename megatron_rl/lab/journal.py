"""The journal of a run: merges metrics over ranks, times phases, and gives each line to the sinks.

The line of an optimizer step waits until the next one, because some of its metrics are known only later: the time of
each phase, the weight sync, and the critic's later passes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_rl.disk import explain
from megatron_rl.lab.console import Console
from megatron_rl.lab.owner import OwnerError
from megatron_rl.lab.sinks import TAGS, Kept, Line, Sink
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.lab.step_summary import summarise
from megatron_rl.lab.timer import PhaseTimer
from megatron_rl.ranks.activity import Activity
from megatron_rl.ranks.place import Place

logger = logging.getLogger(__name__)


class Journal:
    """Only rank 0 has sinks; on the other ranks lines go nowhere. No method is collective."""

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.perf_counter, activity: Activity | None = None
    ) -> None:
        """`activity` hears of the phases too."""
        self.timer = PhaseTimer(clock)
        self.activity = activity or Activity()
        self.failure = ""
        """Why the first failed write failed, in words for the user; empty if all writes succeeded."""
        self._console = console
        self._sinks: Sequence[Sink] = ()
        self._optimizer_steps = 0
        self._held: tuple[dict[str, int], dict[str, float]] | None = None
        self._of_step: list[dict[str, float | None]] = []  # lines of the rollout step that goes on
        self._warned: set[str] = set()

    def open(self, sinks: Sequence[Sink], optimizer_steps: int) -> None:
        """Gives lines to `sinks` from now on; `optimizer_steps` have lines already."""
        self._sinks = sinks
        self._optimizer_steps = optimizer_steps

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase, and shows its name on the console while it runs."""
        with self._console.phase(name), self.timer.phase(name), self.activity.phase(name):
            yield

    def log_update(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Begins the line of an optimizer step, and writes the line of the one before."""
        self.flush()
        self._held = {"step": step, "mini_batch": mini_batch, "weight_version": weight_version}, dict(metrics)

    def add(self, more: Mapping[str, float]) -> None:
        """Adds metrics to the line that waits, if any."""
        if self._held is not None:
            self._held[1].update(more)

    def end_step(self, more: Mapping[str, float]) -> None:
        """Writes the line that waits, with `more`, and then the line of the rollout step."""
        self.add(more)
        held = self._held
        self.flush()
        lines, self._of_step = self._of_step, []
        if held is not None:
            tags = {name: held[0][name] for name in ("step", "weight_version")}
            self._give(Line("steps", tags, time.time(), summarise(lines), self._optimizer_steps))

    def flush(self) -> None:
        """Writes the line that waits, as when the run ends before its step does."""
        held, self._held = self._held, None  # first: the heartbeat's thread may flush while this one hangs
        if held is not None:
            self._optimizer_steps += bool(self._sinks)
            self._write("metrics", *held)

    def log_evaluation(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Writes the line of an evaluation after `step` (0: before the first)."""
        self._write("eval", {"step": step, "weight_version": weight_version}, metrics)

    def log_checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the line of the checkpoint of `step`."""
        self._write("checkpoints", {"step": step}, metrics)

    def sync(self) -> None:
        """Waits until all lines are on the disk, so that no checkpoint outlives the lines before it. Raises OSError."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Writes the line that waits and closes the sinks. Nothing can be logged afterwards."""
        self.flush()
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            with self._noting(sink.what, sink.directory):
                sink.close()

    def _write(self, file: Kept, tags: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        """Writes a line; a metric that is not finite becomes None. A failure is noted and not raised, because all ranks
        must hear of it before this one ends."""
        if not self._sinks:
            return
        if reserved := [name for name in metrics if name in TAGS]:
            raise ValueError(f"metric {reserved[0]!r} has the name of a tag of {file}.jsonl: give it another")
        values = {name: self._finite(name, value, tags["step"]) for name, value in metrics.items()}
        if file == "metrics":
            self._of_step.append(values)
        self._give(Line(file, tags, time.time(), values, self._optimizer_steps))

    def _give(self, line: Line) -> None:
        for sink in self._sinks:
            if not self.failure:
                with self._noting(f"{sink.what} of step {line.tags['step']} in {line.file}.jsonl", sink.directory):
                    sink.write(line)

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

    @contextmanager
    def _noting(self, what: str, directory: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{what} was not written: {explain(error, directory)}"
        except OwnerError as error:
            self.failure = self.failure or str(error)


def reduce_metrics(metrics: MetricAccumulator, place: Place, holds_samples: bool) -> dict[str, float]:
    """Returns the metrics of all ranks together. Collective.

    Tensor- and context-parallel ranks hold the same samples, so one of them counts.
    """
    sums, maxima = metrics.sums.cpu(), metrics.maxima.cpu()
    if not holds_samples or not place.speaks_for_stage:
        empty = MetricAccumulator(metrics.kinds)
        sums, maxima = empty.sums, empty.maxima
    dist.all_reduce(sums, group=place.control)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=place.control)
    total = MetricAccumulator(metrics.kinds)
    total.sums.copy_(sums)
    total.maxima.copy_(maxima)
    return total.finalize()
