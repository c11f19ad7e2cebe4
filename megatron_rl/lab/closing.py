"""What rank 0 says at the end of a run: how it ended, how far it came, where its files are, and what to run next."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from megatron_rl.lab.console_figures import number
from megatron_rl.lab.console_page import clock as as_clock
from megatron_rl.lab.sinks import Line
from megatron_rl.ranks.world import World, read_world
from megatron_rl.stop import Stopped

REWARD, ACCURACY = "rollout/reward/mean", "avg_at_k"
WIDTH = 19
STEPS_KEYS = {"train": "train.steps", "sft": "steps"}
"""By command: the key of the run's last step."""


class Closing:
    """A sink of the journal that remembers the last step, and a context that ends after the console's page."""

    what = "the summary"

    def __init__(self, run_dir: Path, steps: int, say: Callable[[str], None], *, can_go_on: bool = True) -> None:
        """`can_go_on`: whether a run may have more than `steps` steps; saved rollouts have an end."""
        self.directory = run_dir
        self.has_begun = False
        """Whether there is a run to sum up; without one only the error is of interest."""
        self._steps = steps
        self._can_go_on = can_go_on
        self._say = say
        self._start = time.monotonic()
        self._last: Line | None = None

    def write(self, line: Line) -> None:
        if line.file == "steps":
            self._last = line

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.has_begun:
            for line in self._lines(error):
                self._say(line)

    def _lines(self, error: BaseException | None) -> Iterator[str]:
        run, last = self.directory, self._last
        how = "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
        saved = sorted((run / "checkpoints").glob("step-[0-9]*[0-9]"))
        done = last.tags["step"] if last else int(saved[-1].name.split("-")[1]) if saved else 0
        yield f"{how}: step {done} of {self._steps}, {as_clock(time.monotonic() - self._start)} since the start"
        first = _first_line(run / "metrics.jsonl")
        before, now = first.get(REWARD), last.values.get(REWARD) if last else None
        if before is not None and now is not None:
            yield _row("reward", f"{number(before)} at step {first['step']}, {number(now)} at step {done}")
        if scores := _scores(run / "eval.jsonl"):
            (step, score), (best_step, best) = scores[-1], max(scores, key=lambda each: each[1])
            yield _row("held-out accuracy", f"{score:.3f} after step {step}, best {best:.3f} after step {best_step}")
        if error is None:
            yield _row("model", str(run / "model"))
        yield _row("metrics", f"{run / 'metrics.jsonl'}, {run / 'tensorboard'}")
        if saved:
            yield _row("checkpoint", str(saved[-1]))
        yield _row("logs", str(run / "logs"))
        yield _row("report", shlex.join(["megatron-rl", "report", str(run)]))
        name, steps = ("train longer", 2 * self._steps) if error is None else ("go on", None)
        if error is None and not self._can_go_on:
            return
        if command := resume_command(sys.argv, read_world(), steps):
            yield _row(name, command)


def resume_command(argv: Sequence[str], world: World, steps: int | None = None) -> str:
    """Returns the command that continues the run which `argv` began, up to the step `steps`; "" if no command line
    began it. `steps` defaults to what `argv` asks for.

    What asks for a resume or a fork is left out, and --resume comes last.
    """
    if len(argv) < 2 or argv[1] not in STEPS_KEYS:
        return ""
    asked = f"{STEPS_KEYS[argv[1]]}="
    kept: list[str] = []
    before = ""
    for each in argv[1:]:
        is_value = (before, each) == ("--resume", "auto") or before == "--fork"
        if not is_value and each not in ("--resume", "--fork") and not each.startswith(("--resume=", "--fork=")):
            kept.append(each)
        before = each
    if steps is not None:
        kept = [*(each for each in kept if not each.startswith(asked)), f"{asked}{steps}"]
    rest = shlex.join([*kept, "--resume"])
    if world.size > world.local_size:
        return f"torchrun on every node as before, with -m megatron_rl {rest}"
    return f"torchrun --nproc-per-node {world.size} -m megatron_rl {rest}" if world.joined else f"megatron-rl {rest}"


def _row(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"


def _first_line(file: Path) -> dict[str, Any]:
    """Returns the first line of a run's file; {} if there is none."""
    lines = _read(file, 1)
    return lines[0] if lines else {}


def _scores(file: Path) -> list[tuple[int, float]]:
    return [(line["step"], line[ACCURACY]) for line in _read(file) if line.get(ACCURACY) is not None]


def _read(file: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Reads lines of this process's own run; what cannot be read is left out, as the run has another error then."""
    found: list[dict[str, Any]] = []
    try:
        with file.open("rb") as stream:
            for line in stream:
                found.append(orjson.loads(line))
                if len(found) == most:
                    break
    except (OSError, orjson.JSONDecodeError):
        pass
    return found
