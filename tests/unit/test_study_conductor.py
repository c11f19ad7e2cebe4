"""What the conductor makes of the logs of failed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.study.conductor import _reason


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("step 1\nerror: optim.lr: found -1\n", "error: optim.lr: found -1"),
        ("error: first\nstep 2\nerror: last\ncleaning up\n", "error: last"),
        ("Traceback (most recent call last):\n  File x\nRuntimeError: no memory\n", "RuntimeError: no memory"),
        ("torch.OutOfMemoryError: 3 GiB\n  more of it\n", "torch.OutOfMemoryError: 3 GiB"),
        ("step 1\nstep 2\n\n", "step 2"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failed_run_is_its_last_error(log: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    file.write_text(log)
    assert _reason(file) == reason


def test_a_run_without_a_log_has_no_reason(tmp_path: Path) -> None:
    assert _reason(tmp_path / "missing.log") == ""
