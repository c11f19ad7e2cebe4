"""Real servers that die, hang or come back with other weights in the middle of a rollout, beside one that lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sampled_groups import make_prompts
from tiny_models import VOCAB_SIZE

from megatron_rl.data.sample import Group
from megatron_rl.data.versions import Versions
from megatron_rl.rollout import client as client_module
from megatron_rl.rollout import fleet as fleet_module
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.rollout.server import Server, ServerOptions, free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow]
PROMPTS = make_prompts(8)
SAMPLES = 4


@pytest.fixture
def victim(forked_servers: None, tiny_model_dir: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that the test may harm, with the weights of version 0."""
    (port,) = free_ports(1)
    options = ServerOptions(model=tiny_model_dir, port=port, dtype="fp32", max_total_tokens=8192, threads=1)
    server = Server(options, tmp_path / "server.log")
    try:
        server.wait_ready(240.0)
        asyncio.run(load(server.url, tiny_model_dir))
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):  # it is dead
            signal_all(server, signal.SIGCONT)
        server.stop()


async def load(url: str, model: Path) -> None:
    async with SGLangClient(url, deadline=60.0) as client:
        await client.update_weights_from_disk(str(model), weight_version=0)


def signal_all(server: Server, number: signal.Signals) -> None:
    os.killpg(server.pid, number)


def rollout(urls: list[str], harm: Callable[[], None], after: float) -> list[Group]:
    """Samples long responses; calls `harm` in the middle."""
    sampling = Sampling(SAMPLES, 200, 1.0, VOCAB_SIZE, Versions(0), seed=0)

    async def run() -> list[Group]:
        clients = [SGLangClient(url, deadline=300.0) for url in urls]
        sampled = asyncio.ensure_future(rollout_groups(Sampler(Fleet(clients), 16), PROMPTS, sampling))
        try:
            await asyncio.sleep(after)
            assert not sampled.done(), "the rollout was over before the fault; the test shows nothing"
            await asyncio.to_thread(harm)
            return await sampled
        finally:
            for client in clients:
                await client.close()

    return asyncio.run(run())


def assert_complete(groups: list[Group]) -> None:
    assert [(group.index, group.prompt) for group in groups] == PROMPTS
    for group in groups:
        assert [sample.index for sample in group.samples] == list(range(SAMPLES))
        for sample in group.samples:
            assert sample.finish_reason in ("stop", "length")
            assert [span.version for span in sample.versions] == [0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_the_other_server_samples_what_a_dead_or_hanging_one_owes(
    served: str,
    victim: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    seed: int,
) -> None:
    monkeypatch.setattr(fleet_module, "PROBE_SECONDS", 3.0)
    monkeypatch.setattr(fleet_module, "MISSES", 2)
    monkeypatch.setattr(client_module, "MAX_TRIES", 3)
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault]
    start = time.monotonic()
    groups = rollout([victim.url, served], lambda: signal_all(victim, number), random.Random(seed).uniform(0.1, 0.6))
    assert time.monotonic() - start < 120
    assert_complete(groups)
    (warning,) = [record.message for record in caplog.records if "ejected" in record.message]
    assert victim.url in warning


def test_a_server_that_comes_back_with_its_first_weights_is_not_trusted(
    served: str, victim: Server, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server by URL that somebody starts again answers with a version that was never published."""
    again: list[Server] = []

    def restart() -> None:
        signal_all(victim, signal.SIGKILL)
        again.append(Server(victim.options, victim.log))
        again[0].wait_ready(240.0)

    try:
        groups = rollout([victim.url, served], restart, 0.2)
    finally:
        for server in again:
            server.stop()
    assert_complete(groups)
    assert "ejected" in caplog.text
