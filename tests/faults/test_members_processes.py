"""The trainer's own servers that die or hang in a run: the others do their work until they were started again."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from forks import Forks
from rl_runs import GROUP, PROMPTS, write_config

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics

pytestmark = [pytest.mark.server, pytest.mark.distributed, pytest.mark.slow]
SECONDS = 600.0


def numbers_of_servers(metrics: Path) -> list[float]:
    """Returns the numbers of servers of the weight syncs, without repetitions."""
    if not metrics.exists():
        return []
    numbers = [line["weights/servers"] for line in read_metrics(metrics) if "weights/servers" in line]
    return [number for number, _ in itertools.groupby(numbers)]


def process_group(log: Path) -> int:
    """Returns the process group of the server that writes the log."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(log) in (file.path for file in process.open_files()):
                return os.getpgid(process.pid)
    raise AssertionError(f"nobody writes {log}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_server_of_the_trainer_is_started_again(
    forks: Forks, tiny_model_dir: Path, tmp_path: Path, fault: str, seed: int
) -> None:
    """At any moment, that of a broadcast too."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    metrics = tmp_path / "run" / "metrics.jsonl"
    options = (
        f"run_dir={tmp_path / 'run'}",
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        "rollout.servers.launch=2",
        "rollout.servers.threads=1",
        "rollout.servers.max_total_tokens=4096",
        "weights.timeout=20",
        "train.steps=100000",
    )
    run = forks.begin(2, "train_worker:main", config, [" ".join(options)])

    def wait_for(*numbers: float) -> None:
        deadline = time.monotonic() + SECONDS
        while numbers_of_servers(metrics)[: len(numbers)] != list(numbers):
            assert forks.poll(run), run.stderr[-9000:]
            assert time.monotonic() < deadline, run.stderr[-9000:]
            time.sleep(0.1)

    try:
        wait_for(2)
        time.sleep(random.Random(seed).uniform(0.0, 3.0))
        victim = process_group(tmp_path / "run" / "logs" / "server-0.log")
        os.killpg(victim, {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault])
        wait_for(2, 1, 2)
    finally:
        forks.kill(run)
        forks.wait(run)
    for step, files in itertools.groupby(sorted((tmp_path / "run" / "rollouts").glob("*")), lambda f: f.name[:11]):
        groups = [group for file in files for group in read_groups(file)]
        assert len({group.prompt.id for group in groups}) == PROMPTS, step
        assert all(len(group.samples) == GROUP for group in groups)
