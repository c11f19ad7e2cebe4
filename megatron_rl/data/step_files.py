"""The rollout files of a step. Each data-parallel replica writes one, and its header says how many there are."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_rl.data.store import read_header
from megatron_rl.errors import MissingFileError

_NAME = re.compile(r"step-(\d+)-dp-(\d+)\.(?:jsonl|parquet)")


def rollout_file(directory: Path, step: int, dp: int) -> Path:
    return directory / f"step-{step:06d}-dp-{dp:04d}.jsonl"


def rollout_files(directory: Path, step: int) -> list[Path]:
    """Returns the files of a step in the order of replicas; [] if there are none.

    Raises MissingFileError, which names the first file that is not there, if some are, and StoreError for a header
    that is damaged. Files of older versions do not say how many there are: then only a gap between them is found.
    """
    there = {int(match[2]): path for path, match in _named(directory, f"step-{step:06d}-dp-*.jsonl")}
    if not there:
        return []
    said = [read_header(path).files or 0 for path in there.values()]
    expected = max(*said, max(there) + 1)
    if (missing := next((dp for dp in range(expected) if dp not in there), None)) is not None:
        raise MissingFileError(
            f"{rollout_file(directory, step, missing)}: not there, but each of the run's {expected} data-parallel "
            f"replicas wrote a file of step {step}; {len(there)} are there. Copy the rollouts whole."
        )
    return [there[dp] for dp in sorted(there)]


def steps_of(directory: Path) -> list[int]:
    """Returns the steps of which a directory, run_dir/rollouts or run_dir/tokens, has a file."""
    return sorted({int(match[1]) for _, match in _named(directory, "step-*")})


def _named(directory: Path, pattern: str) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in directory.glob(pattern) if (match := _NAME.fullmatch(path.name))]
