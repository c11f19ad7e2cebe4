"""Watches for what ends a run early or makes a checkpoint due; all ranks agree on it once a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import orjson
import torch.distributed as dist

from megatron_rl.disk import DiskError
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.stop import TIME_UP, Clock, Interrupted, Signals, Stopped


class Watch:
    """Signals, the limit of the run's time, and the time of the next checkpoint. Rank 0's clock counts."""

    def __init__(self, control: dist.ProcessGroup, clock: Clock) -> None:
        self.stopping = ""
        """Why the run stops at the end of this step, as all ranks know; empty if it goes on."""
        self.checkpoint_due = False
        """Whether so many minutes have passed since the newest checkpoint, as all ranks know."""
        self._control = control
        self._leads = dist.get_rank(control) == 0
        self._signals = Signals(tells=self._leads)
        self._clock = clock
        self._asked = ""

    def begin(self) -> None:
        """Catches signals from now on, and starts the clock of the first step."""
        self._signals.catch()
        self._clock.begin()

    def close(self) -> None:
        """Gives signals back to the handlers that had them."""
        self._signals.release()

    def stop(self, why: str) -> None:
        """Asks for the end of the run after this step."""
        self._asked = self._asked or why

    def saved(self) -> None:
        self._clock.saved()

    def step_done(self, failure: str, *, last: bool) -> None:
        """Agrees on how the run goes on; nothing stops it after the `last` step. Raises as `agree` does. Collective."""
        self._clock.step_done()
        self.agree(failure)
        if last:
            self.stopping = ""

    def agree(self, failure: str = "") -> None:
        """Tells all ranks what asks for a stop, whether a checkpoint is due, and what could not be written.

        Raises DiskError, on every rank, if any rank has a `failure`. Collective.
        """
        word = {
            "failure": failure,
            "stop": self._signals.received or self._asked or (TIME_UP if self._leads and self._clock.time_up else ""),
            "checkpoint": self._leads and self._clock.checkpoint_due,
        }
        words = [orjson.loads(part) for part in all_gather_bytes(orjson.dumps(word), self._control)]
        if failures := [each["failure"] for each in words if each["failure"]]:
            raise DiskError(failures[0])
        self.stopping = self.stopping or next((each["stop"] for each in words if each["stop"]), "")
        self.checkpoint_due = any(each["checkpoint"] for each in words)

    def halt_if(self, reason: Callable[[], str]) -> None:
        """Stops the run at the end of this step if `reason` of rank 0 gives one. Collective."""
        word = ""
        with together(self._control):
            if self._leads:
                word = reason()
        self.stopping = self.stopping or broadcast_bytes(word.encode(), self._control).decode()

    def wait(self) -> AbstractContextManager[None]:
        """A wait of this rank that a signal ends with Interrupted; `check_interrupted` then tells the other ranks."""
        return self._signals.interrupt()

    def check_interrupted(self, failure: str) -> None:
        """Raises Interrupted on every rank if the run is to stop, and what `agree` raises. Collective."""
        self.agree(failure)
        if self.stopping:
            raise Interrupted

    def stop_if_asked(self, step: int, steps: int) -> None:
        """Raises Stopped if the run is to end with `step` of `steps`, which is saved, or 0."""
        if self.stopping and step < steps:
            saved = "its checkpoint is complete, and --resume goes on from it" if step else "nothing is lost"
            raise Stopped(f"{self.stopping}: stopped after step {step} of {steps}; {saved}", self.stopping)
