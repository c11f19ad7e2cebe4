"""Shows a study on the console while it runs: the run, how many are left, the latest figures, the time left.

A terminal shows one line that changes. A log file gets a plain line when a run begins and when it ends.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

import rich.console
from rich.live import Live
from rich.text import Text

from megatron_rl.errors import UserError
from megatron_rl.study.outcome import RunOutcome, read_lines
from megatron_rl.study.planning import PlannedRun
from megatron_rl.study.study_dir import StudyDir, runs_left

LOOK_SECONDS = 1.0
FIGURES = {
    "metrics": ("rollout/reward/mean", "loss", "grad_norm", "entropy/mean", "kl/old_policy/k3"),
    "eval": ("avg_at_k",),
}
"""Figures of a run's last lines that are shown, if it has them."""


class Board:
    """Reads the study's files from a thread of its own. Use it as a context manager."""

    def __init__(
        self,
        directory: StudyDir,
        runs: Sequence[PlannedRun],
        ended: Callable[[], object],
        file: TextIO | None = None,
    ) -> None:
        """Calls `ended` when a run has ended."""
        out = file or sys.stdout
        self._call = ended
        self.group: Sequence[PlannedRun] = ()
        """Runs that this process has its ranks do now, in order."""
        self._directory = directory
        self._runs = runs
        self._console = rich.console.Console(file=out, force_terminal=out.isatty())
        self._live: Live | None = None
        self._told: set[str] = set(directory.read_results(runs))
        self._began: dict[str, float] = {}
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="board", daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, refresh_per_second=2)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.look()
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def look(self) -> None:
        """Tells of runs that have begun or ended since the last look."""
        with self._looking:
            results = self._directory.read_results(self._runs)
            for name, outcome in results.items():
                if name not in self._told:
                    self._told.add(name)
                    with contextlib.suppress(UserError):  # the conductor does it too, and tells of it
                        self._call()
                    self.say(describe(outcome))
            left = runs_left(self._runs, list(results.values()))
            run = next((run for run in self.group if run.run not in results), None)
            if run is None:
                return
            if run.run not in self._began:
                self._began[run.run] = time.time()
                self.say(f"run {run.task + 1} of {len(self._runs)}: {run.run} begins, {len(left) - 1} more are left")
            if self._live is not None:
                self._live.update(Text(self._status(run, left, list(results.values()))))

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def _status(self, run: PlannedRun, left: Sequence[PlannedRun], results: Sequence[RunOutcome]) -> str:
        lines = read_lines(self._directory.path / "runs" / run.run)
        parts = [f"run {run.task + 1} of {len(self._runs)}: {run.run}"]
        step = lines["metrics"][-1]["step"] if lines["metrics"] else 0
        parts.append(f"step {step}/{run.config.train.steps}")
        for file, names in FIGURES.items():
            last = lines[file][-1] if lines[file] else {}
            parts += [f"{name} {last[name]:.3g}" for name in names if last.get(name) is not None]
        spent = time.time() - self._began.get(run.run, time.time())
        seconds = time_left(run, left, results, spent, step)
        parts += [f"{len(left) - 1} more runs", f"left {_clock(seconds)}"]
        return "  ".join(parts)


def time_left(
    run: PlannedRun, left: Sequence[PlannedRun], results: Sequence[RunOutcome], spent: float, step: int
) -> float | None:
    """Seconds until all runs that are left have ended: as long as the ended runs of their arm took, or else of any arm.

    Before any run has ended, the pace of the running one counts; None before its first step.
    """
    ended = [each for each in results if each.has_values]
    mean = sum(each.seconds for each in ended) / len(ended) if ended else None
    if mean is None:
        if not step:
            return None
        mean = spent * run.config.train.steps / step
    by_arm: dict[str, list[float]] = {}
    for each in ended:
        by_arm.setdefault(each.arm, []).append(each.seconds)
    expected = [sum(by_arm[each.arm]) / len(by_arm[each.arm]) if each.arm in by_arm else mean for each in left]
    return max(sum(expected) - spent, 0.0)


def describe(outcome: RunOutcome) -> str:
    """One line on a run that has ended."""
    figures = [f"{name} {value:.4g}" for name, value in outcome.metrics.items() if value is not None]
    why = f" ({outcome.reason})" if outcome.reason else ""
    where = f"; see {outcome.log}" if outcome.status == "failed" else ""
    steps = f" after {outcome.steps} steps" if outcome.steps is not None else ""
    return "  ".join([f"{outcome.run}: {outcome.status}{steps}, {outcome.seconds:.0f} s{why}{where}", *figures])


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
