"""Shows a run on the console.

A terminal shows a progress bar over rollout steps with the time left, the latest figures, and the time of each phase. A
log file gets one plain line per step.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

import rich.console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from megatron_rl.lab.timer import PREFIX

_PACE_STEPS = 20  # the time left follows from the mean pace of the latest steps


class Console:
    """Shows a run on rank 0. On other ranks (`shows=False`) it prints nothing.

    Use it as a context manager, so that an error leaves the terminal usable.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        shows: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps = total_steps
        self._step = 0
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_PACE_STEPS + 1)
        self._figures: dict[str, str] = {}
        self._times: dict[str, float] = {}
        self._phase = ""
        out = file or sys.stdout
        # Ask the file itself: if the environment forces colours, rich takes a log file for a terminal.
        self._console = rich.console.Console(file=out, force_terminal=out.isatty()) if shows else None
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = self._progress.add_task("", total=total_steps, left="")

    def __enter__(self) -> Self:
        self._ends.append(self._clock())
        console = self._console
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the phase's name while it runs."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    @contextmanager
    def starting(self, part: str, what: str) -> Iterator[None]:
        """Says that a part of the run begins to start, and how long that took; the time left counts from then on."""
        self._say(f"{part}: {what}")
        began = self._clock()
        yield
        now = self._clock()
        self._say(f"{part}: ready after {now - began:.1f} s")
        self._ends.clear()
        self._ends.append(now)

    def step(self, step: int, figures: Mapping[str, float], times: Mapping[str, float]) -> None:
        """Shows the finished step, numbered from 1; `times` are the seconds of its phases by name."""
        self._step = step
        self._ends.append(self._clock())
        self._figures |= {
            name: f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}" for name, value in figures.items()
        }
        self._times = {name.removeprefix(PREFIX): seconds for name, seconds in times.items()}
        self._progress.update(self._bar, completed=step, left=f"left {self._left()}")
        phases = [f"{name} {seconds:.2f}s" for name, seconds in self._times.items()]
        self._line(f"step {step}/{self._total_steps}", *self._shown_figures(), *phases, f"left {self._left()}")

    def heldout(self, accuracy: float) -> None:
        """Shows the accuracy of an evaluation on held-out prompts."""
        self._figures["held-out accuracy"] = f"{accuracy:.3f}"
        self._line(f"after step {self._step}", f"held-out accuracy {accuracy:.3f}")

    def _line(self, *parts: str) -> None:
        """Prints a plain line, unless a progress bar shows the same."""
        if self._live is None:
            self._say("  ".join(parts))

    def _say(self, text: str) -> None:
        """Prints a plain line, above the progress bar if there is one."""
        if self._console is not None:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _draw(self) -> rich.console.Group:
        table = Table.grid(padding=(0, 2))
        for name, seconds in self._times.items():
            share = seconds / (sum(self._times.values()) or 1.0)
            table.add_row(name, f"{seconds:.2f} s", f"{share:.0%}")
        running = f"now: {self._phase}" if self._phase else ""
        return rich.console.Group(self._progress, Text("  ".join(self._shown_figures())), table, Text(running))

    def _shown_figures(self) -> list[str]:
        return [f"{name} {figure}" for name, figure in self._figures.items()]

    def _left(self) -> str:
        """Time left as h:mm:ss; "-" before the first step has ended."""
        if len(self._ends) < 2:
            return "-"
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        seconds = round(pace * (self._total_steps - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
