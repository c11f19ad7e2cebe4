"""Shows a run on the console.

A terminal shows one page, which is drawn over itself (lab/console_page.py). A log file gets one plain line per step.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

import rich.console
from rich.live import Live
from rich.text import Text

from megatron_rl.lab.console_figures import Values, phases, plain
from megatron_rl.lab.console_page import Page, ServerLoad, clock, draw
from megatron_rl.lab.sinks import Line

logger = logging.getLogger(__name__)

_PACE_STEPS = 20  # the time left follows from the mean pace of the latest steps
_WARNINGS = 99


class HasLoad(Protocol):
    @property
    def load(self) -> ServerLoad: ...


class Console:
    """Shows a run on rank 0; it is one of the journal's sinks. On other ranks (`shows=False`) it prints nothing.

    Use it as a context manager, so that an error leaves the terminal usable.
    """

    what = "the console"

    def __init__(
        self,
        total_steps: int,
        *,
        run_dir: Path = Path(),
        shows: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.directory = run_dir
        self.leader: HasLoad | None = None
        """Knows what the servers do; None without servers."""
        self._total_steps = total_steps
        self._step = 0
        self._clock = clock
        self._began = clock()
        self._ends: deque[float] = deque(maxlen=_PACE_STEPS + 1)
        self._values: Values = {}
        self._evaluation: Values = {}
        self._evaluated: int | None = None
        self._checkpoint: tuple[int, float] | None = None
        self._phase = ("", self._began)
        self._warnings: deque[str] = deque(maxlen=_WARNINGS)
        out = file or sys.stdout
        # Ask the file itself: if the environment forces colours, rich takes a log file for a terminal.
        self._console = rich.console.Console(file=out, force_terminal=out.isatty()) if shows else None
        self._live: Live | None = None

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
            self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the phase's name while it runs."""
        outer, self._phase = self._phase, (name, self._clock())
        try:
            yield
        finally:
            self._phase = outer

    @property
    def load(self) -> ServerLoad | None:
        """What the servers do; None without servers."""
        return None if self.leader is None else self.leader.load

    @property
    def running(self) -> str:
        """The phase that runs; empty between phases."""
        return self._phase[0]

    @contextmanager
    def starting(self, part: str, what: str) -> Iterator[None]:
        """Says that a part of the run begins to start, and how long that took; the time left counts from then on."""
        self.say(f"{part}: {what}")
        began = self._clock()
        yield
        now = self._clock()
        self.say(f"{part}: ready after {now - began:.1f} s")
        self._ends.clear()
        self._ends.append(now)

    def warn(self, text: str) -> None:
        """Keeps a warning, already printed, for the page."""
        self._warnings.append(f"{time.strftime('%H:%M:%S')} {' '.join(text.split())}")

    # ---- a sink of the journal -------------------------------------------------------------------------------------

    def write(self, line: Line) -> None:
        """Shows a finished step, an evaluation or a checkpoint."""
        if line.file == "steps":
            self._step = line.tags["step"]
            self._ends.append(self._clock())
            self._values = line.values
            times = [f"{name} {seconds:.2f}s" for name, seconds in phases(line.values).items()]
            figures = plain({**line.values, **self._evaluation})
            self._line(f"step {self._step}/{self._total_steps}", *figures, *times, f"left {self._left()}")
        elif line.file == "eval":
            self._evaluation, self._evaluated = (
                {f"eval/{name}": value for name, value in line.values.items()},
                line.tags["step"],
            )
            self._line(f"after step {self._evaluated}", f"held-out accuracy {line.values['avg_at_k']:.3f}")
        elif line.file == "checkpoints":
            self._checkpoint = line.tags["step"], self._clock()

    def sync(self) -> None: ...

    def close(self) -> None: ...

    # ---- what it prints --------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Prints a plain line, above the page if there is one."""
        logger.info("%s", text)
        if self._console is not None:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _line(self, *parts: str) -> None:
        """Prints a plain line, unless the page shows the same."""
        if self._live is None:
            self.say("  ".join(parts))
        else:
            logger.info("%s", "  ".join(parts))

    def _draw(self) -> Text:
        assert self._console is not None
        now = self._clock()
        phase, since = self._phase
        page = Page(
            run=str(self.directory),
            step=self._step,
            steps=self._total_steps,
            elapsed=now - self._began,
            left=self._left(),
            phase=phase,
            phase_seconds=now - since,
            values={**self._values, **self._evaluation},
            evaluated=self._evaluated,
            checkpoint=self._checkpoint and (self._checkpoint[0], now - self._checkpoint[1]),
            load=self.load,
            warnings=tuple(self._warnings),
        )
        return draw(page, self._console.width, self._console.height - 1)  # the cursor has the last line

    def _left(self) -> str:
        """Time left as h:mm:ss; "-" before the first step has ended."""
        if len(self._ends) < 2:
            return "-"
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return clock(pace * (self._total_steps - self._step))
