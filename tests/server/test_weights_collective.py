"""Weights by broadcast to a real server through a proxy that spoils calls: what a failed or killed trainer leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import Fault, FaultProxy
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.collective import CollectiveRoute, WeightSyncError

pytestmark = pytest.mark.server
TIMEOUT = 120.0
CALLS_BEFORE_WEIGHTS = 4  # end_weight_update, server_info, init_weights_update_group, begin_weight_update


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("trained") / "model", seed=1)


def buckets(model: Path) -> list[list[tuple[str, torch.Tensor]]]:
    tensors = list(load_file(model / "model.safetensors").items())
    return [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]


@contextmanager
def route(url: str, *faults: Fault) -> Iterator[CollectiveRoute]:
    loop = BackgroundLoop()
    proxy = FaultProxy(url, *faults)
    loop.run(proxy.__aenter__())
    client = SGLangClient(proxy.url, deadline=TIMEOUT)
    made = CollectiveRoute([client], loop, torch.device("cpu"), TIMEOUT)
    try:
        yield made
    finally:
        made.close()
        loop.run(client.close())
        loop.run(proxy.__aexit__())
        loop.close()


def ask(url: str, question: Callable[[SGLangClient], Any]) -> Any:
    async def run() -> Any:
        async with SGLangClient(url, deadline=60.0) as client:
            return await question(client)

    return asyncio.run(run())


@pytest.fixture
def expected(served: str, trained: Path, tiny_model_dir: Path) -> str:
    """The server's checksum with the trained weights, which it then has no more."""
    ask(served, lambda c: c.update_weights_from_disk(str(trained), weight_version=1))
    checksum = str(ask(served, lambda c: c.weights_checksum()))
    ask(served, lambda c: c.update_weights_from_disk(str(tiny_model_dir), weight_version=0))
    assert ask(served, lambda c: c.weights_checksum()) != checksum
    return checksum


def assert_next_push_arrives(url: str, trained: Path, expected: str) -> None:
    with route(url) as following:
        for version in (7, 8):
            assert following.push(buckets(trained), version) > 100_000
            assert ask(url, lambda c: c.model_info())["weight_version"] == str(version)
    assert ask(url, lambda c: c.weights_checksum()) == expected


@pytest.mark.parametrize(
    ("calls_before", "what"),
    [(2, "init_weights_update_group"), (CALLS_BEFORE_WEIGHTS, "update_weights_from_distributed")],
)
def test_a_refusal_is_heard_at_once_and_the_next_trainer_does_not_suffer(
    served: str, trained: Path, expected: str, calls_before: int, what: str
) -> None:
    faults = [*[Fault()] * calls_before, Fault(status=400)]
    start = time.monotonic()
    with (
        route(served, *faults) as spoilt,
        pytest.raises(WeightSyncError, match=rf"http://127\.0\.0\.1:\d+/{what}: status 400: .*made up by the proxy"),
    ):
        spoilt.push(buckets(trained), 7)
    assert time.monotonic() - start < TIMEOUT / 4
    assert_next_push_arrives(served, trained, expected)


KILLED = """
import sys, time
import test_weights_collective as t
from pathlib import Path
import torch.distributed as dist

url, model, at = sys.argv[1:]
def stop(*_, **__):
    print("there", flush=True)
    time.sleep(600)
if at == "in the broadcast":
    t.torch.distributed.broadcast = stop
with t.route(url) as route:
    if at == "between begin and end":
        route._send = stop
    route.push(t.buckets(Path(model)), 7)
"""


@pytest.mark.parametrize("at", ["between begin and end", "in the broadcast"])
def test_a_trainer_that_was_killed_in_a_sync_does_not_spoil_the_server(
    served: str, trained: Path, expected: str, at: str
) -> None:
    paths = os.pathsep.join(map(str, [Path(__file__).parent, SUPPORT, ROOT]))
    trainer = subprocess.Popen(
        [sys.executable, "-c", KILLED, served, str(trained), at],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "there\n"
        time.sleep(0.5)  # the server is in the broadcast by then
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.communicate()
    assert_next_push_arrives(served, trained, expected)
