"""Runs and their servers: which of them leaders begin with, servers that change, and what a failed run leaves."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from forks import Forks
from resume_runs import TRAIN
from rl_runs import GROUP, PROMPTS, run_all, write_config

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.rollout.background import BackgroundLoop

STEPS = 9
LONGEST = 17
"""Tokens of a response. Verifications ask for another number."""
DATA = ("data.train=arithmetic:terms=3,split=train,count=64", "rollout.replay_from=null")


@contextlib.contextmanager
def proxies(served: str, number: int) -> Iterator[list[FaultProxy]]:
    """Proxies in front of the server, which a run takes for so many servers."""
    loop, opened = BackgroundLoop(), [FaultProxy(served) for _ in range(number)]
    for proxy in opened:
        loop.run(proxy.__aenter__())
    try:
        yield opened
    finally:
        for proxy in opened:
            loop.run(proxy.__aexit__())
        loop.close()


def requests(proxy: FaultProxy) -> int:
    return sum(path == "/generate" for path, _ in proxy.seen)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
def test_servers_leave_and_come_back_at_weight_syncs(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """One server fails, is well again, and is then taken out of the file of URLs. Two leaders; whichever finds the
    fault, both do without the server until it was verified."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    metrics = tmp_path / "run" / "metrics.jsonl"
    ended = threading.Event()
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

    listed = tmp_path / "urls"
    options = (*DATA, f"rollout.servers.urls_file={listed}", "weights.route=disk", f"train.steps={STEPS}")
    harming = threading.Thread(target=harm)
    with proxies(served, 2) as (odd, good):
        listed.write_text(f"{odd.url}\n{good.url}\n")
        harming.start()
        try:
            run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
        finally:
            ended.set()
            harming.join()
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


@pytest.mark.server
@pytest.mark.distributed
def test_leaders_begin_with_different_servers(forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """If both leaders, with one group each, began with the first server, the other one would stay idle."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    with proxies(served, 2) as opened:
        urls = ",".join(proxy.url for proxy in opened)
        sizes = ("train.steps=1", "train.mini_batches=1", "rollout.prompts_per_step=2")
        servers = (f"rollout.servers.urls=[{urls}]", "weights.route=disk")
        options = (*DATA, *sizes, *servers, f"rollout.max_response_tokens={LONGEST}")
        run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
        asked = [[body["sampling_params"] for path, body in proxy.seen if path == "/generate"] for proxy in opened]
    assert [sum(body["max_new_tokens"] == LONGEST for body in each) for each in asked] == [GROUP, GROUP]


@pytest.mark.server
@pytest.mark.distributed
def test_a_run_that_fails_leaves_the_process_group_of_its_servers(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Servers that run elsewhere live on, and would keep a group for each run."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    with proxies(served, 1) as (proxy,):
        options = (*DATA, f"run_dir={tmp_path / 'run'}", f"rollout.servers.urls=[{proxy.url}]", "train.steps=2")
        failed = forks.run(*TRAIN, config, *options, before=[("patches:fails_in_step", 2)])
        assert failed.status == [2], failed.stderr[-9000:]
        groups = [(path, body["group_name"]) for path, body in proxy.seen if path.endswith("weights_update_group")]
    (joined, name), left = groups
    assert joined == "/init_weights_update_group"
    assert left == ("/destroy_weights_update_group", name)
