"""A run whose servers change."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from forks import Forks
from rl_runs import GROUP, PROMPTS, run_all, write_config

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.rollout.background import BackgroundLoop

STEPS = 9


def requests(proxy: FaultProxy) -> int:
    return sum(path == "/generate" for path, _ in proxy.seen)


@pytest.mark.server
@pytest.mark.distributed
def test_servers_leave_and_come_back_at_weight_syncs(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """One server fails, is well again, and is then taken out of the file of URLs. Two leaders; whichever finds the
    fault, both do without the server until it was verified."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    metrics = tmp_path / "run" / "metrics.jsonl"
    loop, ended = BackgroundLoop(), threading.Event()
    odd, good = FaultProxy(served), FaultProxy(served)
    for proxy in (odd, good):
        loop.run(proxy.__aenter__())
    (listed := tmp_path / "urls").write_text(f"{odd.url}\n{good.url}\n")
    asked: list[int] = []

    def wait_for(*servers: float) -> None:
        """Waits until weight versions were given to so many servers, one after the other."""
        while not ended.wait(0.01) and (not metrics.exists() or found()[: len(servers)] != list(servers)):
            pass
        asked.append(requests(odd))

    def found() -> list[float]:
        """Returns the numbers of servers of the weight syncs, without repetitions."""
        numbers = [line["weights/servers"] for line in read_metrics(metrics) if "weights/servers" in line]
        return [number for number, _ in itertools.groupby(numbers)]

    def harm() -> None:
        wait_for(2)
        odd.always = Fault(status=500)
        wait_for(2, 1)
        odd.always = None
        wait_for(2, 1, 2)
        listed.write_text(f"{good.url}\n")

    harming = threading.Thread(target=harm)
    harming.start()
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        f"rollout.servers.urls_file={listed}",
        "weights.route=disk",
        f"train.steps={STEPS}",
    )
    try:
        run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
    finally:
        ended.set()
        harming.join()
        for proxy in (odd, good):
            loop.run(proxy.__aexit__())
        loop.close()
    assert found() == [2, 1, 2, 1]
    assert asked[0] > 0
    assert asked[2] > asked[1] or requests(odd) > asked[2], "the server got no request after it had come back"
    lines = [line for line in read_metrics(metrics) if "weights/servers" in line]
    came_back = next(b for a, b in itertools.pairwise(lines) if (a["weights/servers"], b["weights/servers"]) == (1, 2))
    assert "weights/probe_max_abs_diff" in came_back, "the server was not verified"
    by_step = [0] * STEPS
    for file in (tmp_path / "run" / "rollouts").glob("*.jsonl"):
        groups = list(read_groups(file))
        assert all(len(group.samples) == GROUP for group in groups)
        by_step[int(file.name.split("-")[1]) - 1] += len(groups)
    assert by_step == [PROMPTS] * STEPS
