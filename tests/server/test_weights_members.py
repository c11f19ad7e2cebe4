"""Weight syncs to two servers, one of which is at fault: the other gets the weights, and the faulty one comes back only
after it was verified."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forks import Forks
from paths import SUPPORT


@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "ranks"), [pytest.param("tp=1", 1, marks=pytest.mark.slow), ("tp=2", 2)])
def test_a_server_at_fault_is_left_out_until_it_was_verified(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path, layout: str, ranks: int
) -> None:
    arguments = (tiny_model_dir, served, layout, tmp_path / "weights")
    done = forks.run(SUPPORT / "members_worker.py", *arguments, ranks=ranks, together=True)
    assert done.returncode == 0, done.stderr[-9000:]
    lines = [json.loads(line) for line in re.findall(r"\{.*?\}", done.stdout)]
    found = {line["case"]: line for line in lines if "used" in line}
    both, one = [True, True], [True, False]
    assert {case: line["used"] for case, line in found.items()} == {
        "both": both,
        "refuses": one,
        "is silent": one,
        "differs": one,
        "is back": both,
    }
    assert [line["pushed"] for line in found.values()] == [2, 1, 1, 2, 2]
    assert [line["verified"] for line in found.values()] == [True, False, False, True, True]
    assert "status 400" in found["refuses"]["why"]
    assert "log-probs of the probe differ" in found["differs"]["why"]
    refused = [line for line in lines if line["case"] == "all"]
    assert len(refused) == ranks, "a rank went on, or hangs"
    assert all("status 400" in line["why"] for line in refused)


@pytest.mark.server
@pytest.mark.distributed
def test_a_server_that_another_leader_has_ejected_is_verified_before_any_leader_uses_it(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    servers, chosen, newcomers = forks.world(2, "choice_worker:main", str(tiny_model_dir), served, str(tmp_path))[0]
    assert chosen == servers
    assert newcomers == servers[1:]
