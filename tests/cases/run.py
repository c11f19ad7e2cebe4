"""Runs the cases: inputs on which the program once failed, each with what should come out.

    python tests/cases/run.py [NAME ...]

A case is a folder: `commands` (bash) runs in a fresh copy of it, and `expected` says what must be printed. Each line of
`expected` must be part of a line of the output, in any order; `...` stands for any text. `never: TEXT` must not be
printed, and `#` opens a comment. The only traceback that may be printed is torchrun's own, of a world that failed. The
commands find the project's Python as `$PYTHON`, and in `MODEL` a copy of the tests' tiny model, which they may change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
SECONDS = 300.0


def names() -> list[str]:
    return sorted(file.parent.name for file in HERE.glob("*/commands"))


def run_case(name: str, model: Path, directory: Path) -> str:
    """Copies the case and `model` below `directory`, runs its commands there, and returns all that they print."""
    place = directory / name
    shutil.copytree(HERE / name, place)
    shutil.copytree(model, place / "MODEL")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS / 'support'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    output = directory / f"{name}.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "commands"],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            log.write(f"\nnot done after {SECONDS:g} s\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left running
            process.wait()
    return output.read_text(errors="replace")


def unmet(name: str, output: str) -> list[str]:
    """The lines of `expected` that the output does not fulfil."""
    lines = (line.rstrip() for line in (HERE / name / "expected").read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith("#")]
    wanted.append("never: not done after")
    tracebacks = output.count("Traceback (most recent call last)") - output.count("    raise ChildFailedError(")
    return [line for line in wanted if not _holds(line, output)] + [f"{tracebacks} tracebacks"] * (tracebacks > 0)


def _holds(line: str, output: str) -> bool:
    text = line.removeprefix("never: ")
    found = re.search(".*".join(re.escape(part) for part in text.split("...")), output) is not None
    return found != line.startswith("never: ")


def main(chosen: list[str]) -> int:
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; there are {', '.join(names())}")
    sys.path.insert(0, str(TESTS / "support"))
    from tiny_models import make_tiny_model

    failed = []
    with tempfile.TemporaryDirectory(prefix="cases-") as scratch:
        model = make_tiny_model(Path(scratch) / "tiny")
        for name in chosen or names():
            output = run_case(name, model, Path(scratch))
            missing = unmet(name, output)
            print(f"==== {name}: {'FAILED' if missing else 'as expected'}\n{output.rstrip()}")
            for line in missing:
                print(f"  not fulfilled: {line}")
            print(flush=True)
            failed += [name] if missing else []
    print(f"{len(chosen or names()) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n  {n}" for n in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
