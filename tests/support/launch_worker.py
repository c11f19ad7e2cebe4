"""Starts ranks of the command line by forking one process that has imported everything: a rank then starts in no time.

Called with a JSON file: a list of launches, each a list of ranks with `directory`, `arguments` and `environment`. All
run at once. Writes to the second file, for each rank, its status, what it printed, and the seconds until its end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.tokenization_auto  # noqa: F401  (what a rank would import)

import megatron_rl.models.check  # noqa: F401
from megatron_rl import cli
from megatron_rl.ranks import agreement


def start(rank: dict[str, Any], output: Path) -> int:
    if pid := os.fork():
        return pid
    os.chdir(rank["directory"])
    os.environ |= rank["environment"]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["megatron-rl", *rank["arguments"]]
    inject(os.environ.get("FAULT"))
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def inject(fault: str | None) -> None:
    """A fault of the program, deep in a library."""
    if fault is None:
        return

    def failing(*_: object) -> None:
        raise {"FileNotFoundError": FileNotFoundError, "TypeError": TypeError}[str(fault)]("libdeep.so")

    agreement.local_files = failing  # type: ignore[assignment]


def main(cases: Path, answer: Path) -> None:
    torch.set_num_threads(1)
    running: dict[int, tuple[int, int, Path]] = {}
    launches = json.loads(cases.read_text())
    started = time.monotonic()
    for i, ranks in enumerate(launches):
        for j, rank in enumerate(ranks):
            output = answer.with_name(f"{answer.stem}-{i}-{j}.out")
            running[start(rank, output)] = (i, j, output)
    results: list[list[Any]] = [[None] * len(ranks) for ranks in launches]
    while running:
        pid, state = os.wait()
        i, j, output = running.pop(pid)
        printed = {name: output.with_suffix(f".{name}").read_text() for name in ("stdout", "stderr")}
        seconds = time.monotonic() - started
        results[i][j] = {"status": os.waitstatus_to_exitcode(state), "seconds": seconds, **printed}
    answer.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
