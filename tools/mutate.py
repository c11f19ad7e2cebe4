"""Takes one guard after another out of the package, and runs the tests that must then fail.

python tools/mutate.py                       # every list in tests/mutations
python tools/mutate.py routing rollout       # some of them
python tools/mutate.py --only "noise floor"  # what has this text in its guard or file
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "mutations"
LIMIT = 300.0
"""Seconds for the tests of one mutation. One that makes them hang is caught, too."""
VERDICTS = {0: "SURVIVED", 1: "caught", None: "caught (the tests hang)"}
"""By pytest's exit status. Any other is a mistake in the list: no such test, or no such module."""


class Mutation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: str
    """What the package does right, and the mutation takes out."""
    file: str
    find: str
    """Text that is in the file once."""
    replace: str
    tests: tuple[str, ...]
    """Ids of tests, as pytest takes them."""

    def mutated(self, text: str) -> str:
        """Raises ValueError unless the text to find is there once."""
        if (count := text.count(self.find)) != 1:
            raise ValueError(f"{self.file}: found {count} times, expected once: {self.find!r}")
        return text.replace(self.find, self.replace)


def read_list(path: Path) -> list[Mutation]:
    return [Mutation.model_validate(each) for each in yaml.safe_load(path.read_text())]


class Workspace:
    """A copy of the tree, in which one file is changed at a time."""

    _times = itertools.count(1_000_000_000)

    def __init__(self, directory: Path) -> None:
        self.root = directory
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if listed.returncode != 0:
            raise SystemExit(f"{ROOT} is not a git checkout, whose files would be copied")
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)

    @contextlib.contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        path = self.root / mutation.file
        before = path.read_text()
        self._write(path, mutation.mutated(before))
        try:
            yield
        finally:
            self._write(path, before)

    def _write(self, path: Path, text: str) -> None:
        """Each version has a time of its own, by which Python knows whether its bytecode is the file's."""
        path.write_text(text)
        moment = next(self._times)
        os.utime(path, (moment, moment))

    def test(self, tests: Sequence[str], limit: float | None = LIMIT) -> tuple[int | None, str]:
        """Returns pytest's exit status, None if it took too long, and the end of its output. Ends what it started."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--timeout", str(LIMIT)]
        running = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = running.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # ranks and servers that a broken test left behind
        return running.returncode, output[-2000:]


def run(mutations: Sequence[Mutation], workers: int) -> list[Mutation]:
    """Returns the mutations that no test caught. Raises SystemExit if a test fails without any mutation."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as parent:
        free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for number in range(workers):
            free.put(Workspace(Path(parent) / str(number)))

        def judge(mutation: Mutation) -> bool:
            workspace, begin = free.get(), time.monotonic()
            try:
                with workspace.mutated(mutation):
                    status, output = workspace.test(mutation.tests)
            finally:
                free.put(workspace)
            verdict = VERDICTS.get(status, f"NOT TESTED (pytest's status {status})")
            print(f"{time.monotonic() - begin:6.1f} s  {verdict:10}  {mutation.file}: {mutation.guard}", flush=True)
            if status not in VERDICTS:
                print(output, flush=True)
            return status in (1, None)

        workspace = free.get()
        status, output = workspace.test(sorted({test for each in mutations for test in each.tests}), limit=None)
        if status != 0:
            raise SystemExit(f"{output}\nA test fails without a mutation, or does not exist; mend it first.")
        free.put(workspace)
        with ThreadPoolExecutor(workers) as pool:
            caught = list(pool.map(judge, mutations))
    return [mutation for mutation, well in zip(mutations, caught, strict=True) if not well]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Lists in tests/mutations; all if none is named.")] = None,
    only: Annotated[str, typer.Option(help="Text in the guard or the file.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Mutations at a time.")] = 2,
) -> None:
    """Takes one guard after another out of the package; its tests must then fail."""
    paths = [LISTS / f"{name}.yaml" for name in names] if names else sorted(LISTS.glob("*.yaml"))
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise typer.BadParameter(f"no such list: {', '.join(missing)}")
    mutations = [each for path in paths for each in read_list(path) if only in f"{each.guard} {each.file}"]
    if not mutations:
        raise typer.BadParameter(f"no mutation has {only!r} in its guard or file")
    survived = run(mutations, workers)
    print(f"{len(mutations) - len(survived)} of {len(mutations)} caught")
    if survived:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
