"""Runs whose rollouts go on during updates and weight syncs, with their own server."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import orjson
import pytest
from forks import Forks
from rl_runs import run_all, write_config
from scraper import Scraper
from tiny_models import make_tiny_model

from megatron_rl.data.sample import Group
from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.ledger import oldest_version
from megatron_rl.rollout.server import free_ports
from tools.write_dashboard import dashboard

STEPS = 5


def train(
    forks: Forks, root: Path, lag: int, concurrency: int, *more: str
) -> tuple[list[dict[str, Any]], list[list[Group]]]:
    """Returns the lines of metrics, and each step's groups over all leaders."""
    model = make_tiny_model(root / "model", num_layers=2)
    config = write_config(root / "config.yaml", model, root / "unused")
    prompts = root / "prompts.jsonl"
    prompts.write_bytes(b"\n".join(orjson.dumps({"prompt": f"{n}+1=", "answer": "0"}) for n in range(64)) + b"\n")
    options = (
        f"data.train={prompts}",
        "data.verifier=verifier_examples:longer",  # rewards what a random model does, so that it learns
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        "rollout.max_response_tokens=96",
        f"rollout.concurrency={concurrency}",
        f"rollout.lag={lag}",
        f"train.steps={STEPS}",
        "weights.verify=1",
        "optim.lr=1e-3",
        *more,
    )
    run_all(forks, config, 2, [f"run_dir={root / 'run'} {' '.join(options)}"])
    files = sorted((root / "run" / "rollouts").glob("*.jsonl"))
    by_step = itertools.groupby(files, key=lambda file: file.name.split("-dp-")[0])
    steps = [sorted((g for f in of_step for g in read_groups(f)), key=lambda g: g.index) for _, of_step in by_step]
    return read_metrics(root / "run" / "metrics.jsonl"), steps


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize(("lag", "concurrency"), [(1, 2), (3, 64)])
def test_rollouts_go_on_during_updates_and_syncs(forks: Forks, tmp_path: Path, lag: int, concurrency: int) -> None:
    """With few requests at a time rollouts take longer than updates, so that a sync finds responses in flight. With
    many all that may begin begins at once, so that the lag is used up. Meanwhile the run is watched as Prometheus does
    it, and its endpoint has every series of the dashboard."""
    (port,) = free_ports(1)
    watched = (f"lab.prometheus.port={port}", f"data.heldout={tmp_path / 'prompts.jsonl'}", "eval.prompts=2")
    with Scraper(port) as scraper:
        lines, steps = train(forks, tmp_path, lag, concurrency, *watched, "checkpoint.every=2")
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert [each for each in expressions if not scraper.has(each)] == []
    assert {"rollout", "update", "weight_sync"} <= scraper.phases
    assert scraper.values["megatron_rl_requests", frozenset({("state", "running")})] >= 0
    prompts = [group.prompt.id for groups in steps for group in groups]
    assert len(prompts) == len(set(prompts)) == STEPS * len(steps[0])
    mixed = 0
    for step, groups in enumerate(steps, start=1):
        assert [group.index for group in groups] == list(range(len(groups)))
        samples = [sample for group in groups for sample in group.samples]
        versions = {span.version for sample in samples for span in sample.versions}
        assert max(0, step - 1 - lag) <= min(versions)
        assert max(versions) <= step - 1
        if step > lag:
            assert min(versions) < step - 1
        mixed += sum(len(sample.versions) > 1 for sample in samples)
    assert mixed or concurrency > 2, "no response was in flight during a sync; the test shows nothing"
    assert max(line["rollout/staleness/max"] for line in lines if "rollout/staleness/max" in line) == lag
    # Tokens after a sync were sampled as the new weights say, whatever their beginning was sampled with.
    fresh, old = (
        [line[name] for line in lines if line.get(name) is not None]
        for name in ("mismatch/abs_logprob_gap/lag_0", "mismatch/abs_logprob_gap/lag_1")
    )
    assert 0 < max(fresh) < 1e-4 < min(old)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
def test_a_step_takes_what_is_done_first_and_nothing_older_than_the_lag(forks: Forks, tmp_path: Path) -> None:
    lag = 1
    lines, steps = train(forks, tmp_path, lag, 8, "rollout.over_sampling=2")
    prompts = [group.prompt.id for groups in steps for group in groups]
    assert len(prompts) == len(set(prompts)) == STEPS * len(steps[0])
    figures = [line for line in lines if "rollout/over_sampling/carried_over" in line]
    assert len(figures) == STEPS
    carried = 0
    for step, (groups, line) in enumerate(zip(steps, figures, strict=True), start=1):
        assert [group.index for group in groups] == list(range(len(groups)))
        ages = [step - 1 - oldest_version(group) for group in groups]
        assert 0 <= min(ages) <= max(ages) <= lag
        assert line["rollout/staleness/max"] == max(ages)
        assert line["rollout/over_sampling/carried_over"] == sum(age > 0 for age in ages) / len(ages)
        carried += sum(age > 0 for age in ages)
    assert carried
    left = [line["rollout/over_sampling/left_done"] + line["rollout/over_sampling/left_unfinished"] for line in figures]
    assert left == [len(steps[0])] * (STEPS - 1) + [0]
    fresh = [line[name] for line in lines if line.get(name := "mismatch/abs_logprob_gap/lag_0") is not None]
    assert 0 < max(fresh) < 1e-4


@pytest.mark.server
@pytest.mark.distributed
def test_servers_that_a_killed_trainer_left_paused_are_used(
    forks: Forks, served: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    async def pause() -> None:
        async with SGLangClient(served) as client:
            await client.pause_generation("retract")

    async def resume() -> None:
        async with SGLangClient(served) as client:
            await client.continue_generation()

    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        f"rollout.servers.urls=[{served}]",
        "rollout.deadline=20",
        "train.steps=1",
    )
    asyncio.run(pause())
    try:
        run_all(forks, config, 1, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
    finally:
        asyncio.run(resume())
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")
