"""A checkpoint of any run, as the command line names it: RUN@STEP, or RUN@last for the newest complete one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.sources import ConfigError, shown
from megatron_rl.disk import expected_of
from megatron_rl.engine.manifest import Manifest, checkpoints, read_manifest, step_of
from megatron_rl.errors import MissingFileError

LISTED_STEPS = 8


@dataclass(frozen=True)
class CheckpointName:
    run: Path
    step: int | None
    """None: the newest complete checkpoint."""

    def __str__(self) -> str:
        return f"{self.run}@{'last' if self.step is None else self.step}"

    @classmethod
    def parse(cls, text: str, option: str, *, needs_step: bool = True) -> CheckpointName:
        """Reads RUN@STEP or RUN@last; a RUN alone is its newest checkpoint unless `needs_step`. Raises ConfigError."""
        if expected := expected_of(text.rpartition("@")[0] or text):
            raise ConfigError(f"{option}: found {shown(text)}, expected {expected}")
        match = re.fullmatch(r"(.+)@(\d{1,9}|last)", text)
        if match is not None:
            return cls(Path(match[1]), None if match[2] == "last" else int(match[2]))
        if needs_step or "@" in text:
            raise ConfigError(f"{option}: found {text!r}, expected RUN_DIR@STEP such as runs/first@20, or RUN_DIR@last")
        return cls(Path(text), None)

    def find(self) -> tuple[Path, Manifest]:
        """Returns the checkpoint's directory and manifest.

        Raises MissingFileError if the run or its checkpoint is not there, and CheckpointError if the manifest is
        damaged or of another format.
        """
        if not (self.run / "config.yaml").is_file():
            raise MissingFileError(f"{self.run}: no run, because it has no config.yaml; name the run_dir of a run")
        found = {step_of(directory): directory for directory in checkpoints(self.run / "checkpoints")}
        if not found:
            raise MissingFileError(f"{self.run} has no complete checkpoint; checkpoint.every says when one is saved")
        step = max(found) if self.step is None else self.step
        if step not in found:
            steps = ", ".join(map(str, sorted(found)[-LISTED_STEPS:]))
            more = f"the newest are {steps}" if len(found) > LISTED_STEPS else f"it has {steps}"
            raise MissingFileError(f"{self.run} has no complete checkpoint of step {step}; {more} (checkpoint.keep)")
        return found[step], read_manifest(found[step])
