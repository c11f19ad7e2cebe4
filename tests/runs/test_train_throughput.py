"""The benchmark of training, whose memory on a CPU is what the plan says: the only check of a plan's total."""

from __future__ import annotations

import re

import pytest
from forks import Forks
from paths import ROOT

BOUND = 0.1


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_an_update_allocates_what_is_planned(forks: Forks, recompute: str) -> None:
    sizes = ("--sequences", "32", "--rows", "32", "--repeats", "1")
    done = forks.run(ROOT / "benchmarks" / "train_throughput.py", *sizes, "--recompute", recompute, directory=ROOT)
    assert done.returncode == 0, done.stderr
    (ratio,) = re.findall(r"^memory of an update: .* ratio ([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(ratio) == pytest.approx(1, abs=BOUND)
    assert "RL gradient / bare schedule" in done.stdout
