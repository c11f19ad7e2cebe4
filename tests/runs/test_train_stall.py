"""A run that waits for a server which hangs ends, and names the server; one that waits for slow answers goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from forks import Forks
from rl_runs import write_config
from tiny_models import VOCAB_SIZE

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.versions import Versions
from megatron_rl.errors import LostRankError
from megatron_rl.lab.run import read_metrics
from megatron_rl.ranks.activity import Activity
from megatron_rl.rollout import fleet
from megatron_rl.rollout.sampler import Sampling
from megatron_rl.rollout.server import Server
from megatron_rl.rollout.source import Leader

STALL = 6.0


@pytest.mark.server
def test_a_run_whose_server_hangs_ends_and_names_it(
    forks: Forks, served: str, tiny_server: Server, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "rl.yaml", tiny_model_dir, tmp_path / "unused")
    metrics = tmp_path / "run" / "metrics.jsonl"
    options = [f"run_dir={tmp_path / 'run'}", "data.train=arithmetic:terms=3,split=train,count=64", "train.steps=1000"]
    options += ["rollout.replay_from=null", f"rollout.servers.urls=['{served}']", f"engine.stall={STALL}"]
    run = forks.start("-m", "megatron_rl", "train", config, *options)
    while not (metrics.exists() and metrics.stat().st_size):
        assert forks.poll(run), run.stderr[-3000:]
        time.sleep(0.1)
    os.killpg(tiny_server.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        forks.wait(run, timeout=60)
    finally:
        os.killpg(tiny_server.pid, signal.SIGCONT)
    assert run.status == [LostRankError.status], run.stderr[-3000:]
    assert STALL < time.monotonic() - stopped < 3 * STALL
    (error,) = (line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert "nothing has moved for" in error
    assert f"{served} owes " in error
    assert " in rollout (rollout/background.py:" in error or " in weight sync (" in error
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == sorted(steps)


def sample_through(url: str, delay: float) -> tuple[list[Group], int]:
    """Samples a response that the server gives after the delay; returns it, and how often something moved before."""

    async def run() -> tuple[list[Group], int]:
        async with FaultProxy(url, Fault(delay=delay)) as proxy:
            activity = Activity()
            leader = Leader([proxy.url], api_key=None, deadline=60.0, activity=activity)
            prompt = Prompt("p", "", (5, 6), "", "")
            sampling = Sampling(1, 1, 1.0, VOCAB_SIZE, Versions(0), seed=0)
            waiting = asyncio.create_task(asyncio.to_thread(leader.sample, [(0, prompt)], sampling))
            await asyncio.sleep(delay - 0.3)
            moves = activity.note()["moves"]
            groups = await waiting
            await asyncio.to_thread(leader.close)
            return groups, moves

    return asyncio.run(run())


@pytest.mark.server
def test_a_server_that_answers_late_and_is_well_counts_as_moving(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PROBE_SECONDS", 1.8)
    monkeypatch.setattr(fleet, "MISSES", 99)
    groups, moves = sample_through(served, delay=5.0)
    assert len(groups[0].samples) == 1
    assert moves >= 1


def test_micro_batches_exports_and_checkpoints_are_moves(forks: Forks, tiny_model_dir: Path, tmp_path: Path) -> None:
    """So a long update, export or checkpoint is no hang."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n' * 8)
    (tmp_path / "sft.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {tiny_model_dir}}}\nsteps: 2\nbatch_size: 8\n"
        "engine: {device: cpu, dtype: fp32, max_tokens_per_micro_batch: 16}\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}, max_tokens: 16}}\n"
    )
    moves = str(tmp_path / "moves.json")
    run = forks.run("-m", "megatron_rl", "sft", tmp_path / "sft.yaml", before=[("patches:record_moves", moves)])
    assert run.status == [0], run.stderr
    found = json.loads(Path(moves).read_text())
    assert found["<lambda>"] >= 2 * 8 * 6 / 16  # two steps of 8 examples of 6 tokens
    assert found["_moving"] >= 1
    assert found["write_tensors"] > 10
    assert found["phase"] > 4
