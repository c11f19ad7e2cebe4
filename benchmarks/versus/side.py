"""A trainer that is started, makes some steps at a time, and is stopped in between with all its processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from versus.turns import Turns

BENCHMARKS = Path(__file__).parent.parent
LOOK_SECONDS = 0.01


@dataclass
class Side:
    """One of the two trainers."""

    name: str
    command: list[str]
    directory: Path
    threads: int
    process: psutil.Popen | None = None
    steps: int = 0
    block_seconds: list[float] = field(default_factory=list)
    """A step's seconds, by block."""
    block_core_seconds: list[float] = field(default_factory=list)
    """The processor time that its processes take for a step, by block."""

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        self.turns = Turns.within(self.directory)
        self.turns.grant(0)
        self.log = self.directory / "log"
        paths = os.pathsep.join((str(BENCHMARKS.parent), str(BENCHMARKS)))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.threads)}
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                self.command, cwd=BENCHMARKS.parent, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def block(self, to: int) -> None:
        """Makes the steps up to number `to`, and notes what they cost."""
        made, before = to - self.steps, self._core_seconds()
        self.block_seconds.append(self.step_to(to) / made)
        self.block_core_seconds.append((self._core_seconds() - before) / made)

    def step_to(self, steps: int) -> float:
        """Makes the steps up to number `steps`, and stops; returns the seconds."""
        start = time.perf_counter()
        self.turns.grant(steps)
        self._resume()
        while len(self.turns.done()) < steps:
            self._check()
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - start
        for process in self._processes():
            process.suspend()
        self.steps = steps
        return seconds

    def finish(self) -> None:
        """Lets it save its model and end."""
        self.turns.grant(self.steps + 1)
        self._resume()
        while self._status() is None:
            time.sleep(LOOK_SECONDS)
        self._check(ended=True)

    def kill(self) -> None:
        for process in self._processes():
            process.kill()

    def phases(self) -> dict[str, float]:
        """Median seconds of each phase of the counted steps."""
        records = [record["seconds"] for record in self.turns.done()[1:]]
        return {name: statistics.median(record.get(name, 0.0) for record in records) for name in records[-1]}

    def _processes(self) -> list[psutil.Process]:
        if self.process is None or not self.process.is_running():
            return []
        return [self.process, *self.process.children(recursive=True)]

    def _core_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    def _resume(self) -> None:
        for process in self._processes():
            process.resume()

    def _status(self) -> int | None:
        assert self.process is not None
        status: int | None = self.process.poll()
        return status

    def _check(self, *, ended: bool = False) -> None:
        status = self._status()
        if status or (status is not None and not ended):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.name} ended with status {status}; the end of {self.log}:\n{tail}")
