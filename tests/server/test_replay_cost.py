"""The benchmark of routing replay runs to its end."""

from __future__ import annotations

import pytest
from forks import Forks
from paths import ROOT

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_the_cost_of_replay_is_measured(forks: Forks) -> None:
    done = forks.run(ROOT / "benchmarks" / "replay_cost.py", "--repeats", "1", directory=ROOT)
    assert done.returncode == 0, done.stderr
    assert "trainer's step, R3 / live" in done.stdout
    assert "traces as held" in done.stdout
