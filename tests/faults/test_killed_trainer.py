"""Trainers that are killed while servers live that somebody else has started, and go on with the same servers."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from forks import Forks
from resume_runs import TRAIN, assert_refused, read_rollouts
from rl_runs import GROUP, PROMPTS, weights, write_config

from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server import Server, ServerOptions, free_ports

pytestmark = [pytest.mark.server, pytest.mark.distributed]
STEPS, RANKS = 6, 2
CHECKPOINT = "checkpoint"
PHASES = ("rollout", "update", "weight sync", CHECKPOINT)
SECONDS = 300.0


@pytest.fixture
def urls(served: str, forked_servers: None, tiny_model_dir: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Two servers that hold the model's weights as version 0."""
    (port,) = free_ports(1)
    options = ServerOptions(model=tiny_model_dir, port=port, dtype="fp32", max_total_tokens=8192, threads=1)
    server = Server(options, tmp_path / "server.log")
    try:
        server.wait_ready(SECONDS)
        yield [served, server.url]
    finally:
        server.stop()


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Path:
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    prompts = "".join(f'{{"prompt": "{n}+1=", "answer": "0"}}\n' for n in range(STEPS * PROMPTS))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    return config


def command(config: Path, run_dir: Path, *options: str) -> tuple[str | Path, ...]:
    data = (f"data.train={config.with_name('prompts.jsonl')}", "data.verifier=verifier_examples:longer")
    sizes = (f"train.steps={STEPS}", "rollout.max_response_tokens=96", "optim.lr=1e-3")
    return (*TRAIN, config, f"run_dir={run_dir}", *data, *sizes, "rollout.replay_from=null", *options)


def kill_in(forks: Forks, words: Sequence[str | Path], run_dir: Path, phase: str, chance: random.Random) -> bool:
    """Starts a trainer and kills all its ranks a moment after this phase begins, or a checkpoint is being written, once
    there is a whole checkpoint. Returns False if the run was over before."""
    run = forks.start(*words, ranks=RANKS, before=[("patches:tell_phases",), ("patches:slow_files", 0.5)])
    deadline = time.monotonic() + SECONDS

    def comes(condition: Callable[[], object]) -> bool:
        while not condition():
            if not forks.poll(run):
                return False
            assert time.monotonic() < deadline, run.stderr[-9000:]
            time.sleep(0.005)
        return True

    def begun() -> int:
        return run.stdout.count(f"phase {phase}\n")

    if comes(lambda: list(run_dir.glob("checkpoints/step-??????/manifest.json"))):
        enough = begun() + RANKS * chance.choice((1, 2))
        written = phase == CHECKPOINT
        if comes(lambda: list(run_dir.glob("checkpoints/*.partial")) if written else begun() >= enough):
            time.sleep(chance.uniform(0.0, 0.3))
            forks.kill(run)
    forks.wait(run)
    assert run.status in ([0] * RANKS, [-signal.SIGKILL] * RANKS), run.stderr[-9000:]
    print(f"{phase}: ended in {run.stdout.splitlines()[-1]}")
    return run.status != [0] * RANKS


def assert_trained_once(run_dir: Path, lag: int) -> None:
    """Every prompt's group is that of one step, and no token is older than the lag allows, or newer than the step."""
    trained = []
    for step in range(1, STEPS + 1):
        groups = read_rollouts(run_dir, step)
        assert [group.index for group in groups] == list(range(PROMPTS))
        for group in groups:
            trained.append(group.prompt.id)
            assert len(group.samples) == GROUP
            versions = {span.version for sample in group.samples for span in sample.versions}
            assert max(0, step - 1 - lag) <= min(versions)
            assert max(versions) <= step - 1
    assert len(set(trained)) == STEPS * PROMPTS
    assert not list((run_dir / "pending").iterdir())


async def assert_idle(url: str) -> None:
    """The server has the newest weights, answers, has no request in flight, and no update is open."""
    async with SGLangClient(url, deadline=30.0) as client:
        assert (await client.model_info())["weight_version"] == str(STEPS)
        await client.flush_cache()
        await client.health()
        await client.begin_weight_update()
        await client.end_weight_update()


def test_requests_of_a_trainer_whose_host_is_gone_are_ended(
    forks: Forks, served: str, config: Path, tmp_path: Path
) -> None:
    """Its connections stay open. Servers take no new weights while requests are in flight."""

    async def ask(client: httpx.AsyncClient) -> str:
        sampling = {"max_new_tokens": 450, "ignore_eos": True}
        answer = await client.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": sampling})
        return str(answer.json()["meta_info"]["finish_reason"]["type"])

    async def ask_and_train() -> list[str]:
        async with httpx.AsyncClient(base_url=served, timeout=SECONDS) as client:
            asked = [asyncio.ensure_future(ask(client)) for _ in range(64)]
            await asyncio.sleep(1.0)
            words = command(config, tmp_path / "run", f"rollout.servers.urls=[{served}]", "train.steps=1")
            done = await asyncio.to_thread(forks.run, *words)
            assert done.status == [0], done.stderr[-9000:]
            return await asyncio.gather(*asked)

    assert "abort" in asyncio.run(ask_and_train()), "they were done before; the test shows nothing"


def test_a_run_whose_first_weight_sync_fails_leaves_no_directory(
    forks: Forks, served: str, config: Path, tmp_path: Path
) -> None:
    words = command(config, tmp_path / "run", f"rollout.servers.urls=[{served}]")
    done = forks.run(*words, before=[("patches:failing_first_sync",)])
    assert_refused(done, "weight version 0: refused")
    assert "weights: version 0 to all servers" in done.stdout, "it has failed earlier; the test shows nothing"
    assert not (tmp_path / "run").exists()


def test_a_run_whose_server_does_not_start_leaves_its_log_alone(forks: Forks, config: Path, tmp_path: Path) -> None:
    words = command(config, tmp_path / "run", "rollout.servers.extra_flags=[--schedule-policy, worst]")
    done = forks.run(*words)
    assert_refused(done, "invalid choice: 'worst'")
    assert not (tmp_path / "run").exists()
    told = re.search(rf"the run has not begun: {tmp_path / 'run' / 'logs'} is now (\S+)", done.stderr)
    assert told, done.stderr
    assert "invalid choice: 'worst'" in Path(told[1], "server-0.log").read_text()
    shutil.rmtree(told[1])


@pytest.mark.parametrize(
    ("lag", "seed"),
    [
        pytest.param(lag, seed, marks=[pytest.mark.slow] * ((lag, seed) != (0, 0)))
        for lag, seed in itertools.product((0, 2), range(4))
    ],
)
def test_a_killed_trainer_goes_on_with_the_same_servers(
    forks: Forks, urls: list[str], config: Path, tmp_path: Path, lag: int, seed: int
) -> None:
    """It is killed in another phase each time. It ends with the weights of a run that was left alone, or with a lag, of
    one that has the same rollouts, bit for bit."""
    chance = random.Random(seed)
    run_dir = tmp_path / "run"
    options = (f"rollout.servers.urls=[{','.join(urls)}]", f"rollout.lag={lag}", "checkpoint.every=2")
    words = command(config, run_dir, *options)
    for number, phase in enumerate(chance.sample(PHASES, 1 if seed == 0 else 4)):
        if not kill_in(forks, words, run_dir, phase, chance):
            assert number > 0, "the run was over before it was killed; the test shows nothing"
            break
        words = command(config, run_dir, *options, "--resume")
    done = forks.run(*words, ranks=RANKS)
    assert done.status == [0] * RANKS, done.stderr[-9000:]
    assert_trained_once(run_dir, lag)
    for url in urls:
        asyncio.run(assert_idle(url))

    # With a lag, what is in flight during a sync depends on time, so the other run has the same rollouts.
    same = options if lag == 0 else (f"rollout.replay_from={run_dir}",)
    whole = forks.run(*command(config, tmp_path / "whole", *same), ranks=RANKS)
    assert whole.status == [0] * RANKS, whole.stderr[-9000:]
    expected = weights(tmp_path / "whole")
    for name, weight in weights(run_dir).items():
        assert torch.equal(weight, expected[name]), name
