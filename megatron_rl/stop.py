"""Stops a run before its last step: at a signal, or when its time is up. Imports no torch.

torchrun passes SIGTERM and SIGINT on to its ranks, and kills them 30 seconds later. It passes SIGUSR1 on if
TORCHELASTIC_SIGNALS_TO_HANDLE names it. Slurm sends the signal of its `--signal` option some time before its limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from megatron_rl.errors import UserError

STATUS = 75
"""Exit status of a run that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h."""
TIME_UP = "max_minutes"
"""Why a run stops whose time is up."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 5.0
"""A launcher may pass on a signal that the process already has. Within this time a repeated signal is not counted."""


class Stopped(UserError):
    """Ends a run early. All its finished steps are in a checkpoint."""

    status = STATUS

    def __init__(self, text: str, reason: str = "") -> None:
        """`reason`: the name of a signal, TIME_UP, or what a `halt` said (train.py)."""
        super().__init__(text)
        self.reason = reason


class NothingLeft(Stopped):
    """Ends a resume of a run that has made all its steps and written its models. It is no failure: `train` and `sft`
    return."""

    status = 0


class Interrupted(Exception):
    """Raised by a signal inside `Signals.interrupt`."""


class Signals:
    """Notes the first signal; the loop looks after each step. A second signal ends the process at once."""

    def __init__(self, tells: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.received = ""
        """Name of the signal."""
        self._tells = tells
        self._clock = clock
        self._first = 0.0
        self._raises = False
        self._before: dict[signal.Signals, Any] = {}

    def catch(self) -> None:
        """Catches signals until `release`. A signal that the process was started to ignore stays ignored.

        Does nothing outside the main thread, which alone can catch signals.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def interrupt(self) -> Iterator[None]:
        """Raises Interrupted in the body if a signal comes or has come. Use it for waits whose result may be lost."""
        self._raises = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            if self._clock() - self._first > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._first = signal.Signals(number).name, self._clock()
        if self._tells:
            # Not print: the signal may have interrupted a print.
            os.write(2, self._notice().encode())
        if self._raises:
            raise Interrupted

    def _notice(self) -> str:
        return (
            f"\n{self.received}: the run stops at the end of this step, with a checkpoint. "
            f"A second signal, after {ECHO_SECONDS:g} seconds, ends it at once.\n"
        )


class Clock:
    """Tells rank 0 whether a checkpoint is due, and whether the run's time is up."""

    def __init__(
        self,
        checkpoint_minutes: float | None,
        max_minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoint_minutes = checkpoint_minutes
        self._max_minutes = max_minutes
        self._clock = clock
        self._start = self._saved = self._step = clock()
        self._longest = 0.0
        self.time_up = False
        """Whether another step as long as the longest so far would end after the limit."""

    def begin(self) -> None:
        """Starts the time of the first step."""
        self._saved = self._step = self._clock()

    def saved(self) -> None:
        self._saved = self._clock()

    def step_done(self) -> None:
        now = self._clock()
        self._longest = max(self._longest, now - self._step)
        self._step = now
        if self._max_minutes is not None:
            self.time_up = now - self._start + self._longest > 60 * self._max_minutes

    @property
    def checkpoint_due(self) -> bool:
        minutes = self._checkpoint_minutes
        return minutes is not None and self._clock() - self._saved >= 60 * minutes
