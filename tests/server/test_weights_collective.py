"""Weight sync by broadcast to a real server, through a proxy that fails calls: the server survives a failed trainer."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broadcast import TIMEOUT, buckets, route
from fault_proxy import Fault
from forks import Forks
from paths import SUPPORT
from safetensors.torch import load_file
from sync_worker import PEAK_BUCKET_BYTES
from tiny_models import VOCAB_SIZE, make_tiny_model, reference_logprobs

from megatron_rl.rollout import fleet
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.all_servers import WeightSyncError
from megatron_rl.weights.collective import CLOSE_SECONDS

pytestmark = pytest.mark.server
CALLS_BEFORE_WEIGHTS = 4  # end_weight_update, server_info, init_weights_update_group, begin_weight_update


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("trained") / "model", seed=1)


def ask(url: str, question: Callable[[SGLangClient], Any]) -> Any:
    async def run() -> Any:
        async with SGLangClient(url, deadline=60.0) as client:
            return await question(client)

    return asyncio.run(run())


@pytest.fixture
def expected(served: str, trained: Path, tiny_model_dir: Path) -> str:
    """The server's checksum with the trained weights. Afterwards the server has its original weights again."""
    ask(served, lambda c: c.update_weights_from_disk(str(trained), weight_version=1))
    checksum = str(ask(served, lambda c: c.weights_checksum()))
    ask(served, lambda c: c.update_weights_from_disk(str(tiny_model_dir), weight_version=0))
    assert ask(served, lambda c: c.weights_checksum()) != checksum
    return checksum


def assert_next_push_arrives(url: str, trained: Path, expected: str) -> None:
    with route(url) as following:
        for version in (7, 8):
            assert following.push(buckets(trained), version).bytes > 100_000
            assert ask(url, lambda c: c.model_info())["weight_version"] == str(version)
    assert ask(url, lambda c: c.weights_checksum()) == expected


def test_prefixes_that_were_cached_before_a_weight_sync_are_not_used_after_it(served: str, trained: Path) -> None:
    prompt = list(range(5, 29))

    def greedy(client: SGLangClient) -> Any:
        return client.generate(prompt, max_new_tokens=8, temperature=0.0, vocab_size=VOCAB_SIZE, versions={0, 7})

    ask(served, greedy)
    with route(served) as sync:
        sync.push(buckets(trained), 7)
    found = ask(served, greedy)
    expected = reference_logprobs(trained, [*prompt, *found.token_ids])[len(prompt) - 1 :]
    np.testing.assert_allclose(found.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("calls_before", "what"),
    [(2, "init_weights_update_group"), (CALLS_BEFORE_WEIGHTS, "update_weights_from_distributed")],
)
def test_a_refused_weight_sync_fails_at_once_and_the_next_trainer_can_sync(
    served: str, trained: Path, expected: str, calls_before: int, what: str
) -> None:
    faults = [*[Fault()] * calls_before, Fault(status=400, delay=1.0)]  # later than the call that could follow
    start = time.monotonic()
    with (
        route(served, *faults) as spoilt,
        pytest.raises(WeightSyncError, match=rf"http://127\.0\.0\.1:\d+/{what}: status 400: .*made up by the proxy"),
    ):
        spoilt.push(buckets(trained), 7)
    assert time.monotonic() - start < TIMEOUT / 4
    assert_next_push_arrives(served, trained, expected)


@pytest.mark.parametrize("bucket", [0, 1])
def test_weights_that_the_server_cannot_load_fail_the_sync(
    served: str, trained: Path, expected: str, bucket: int
) -> None:
    """The first bucket is loaded when the second is asked for, and the second when the session ends."""
    call = ["update_weights_from_distributed", "end_weight_update"][bucket]
    sent = buckets(trained)
    place = next(i for i, (name, _) in enumerate(sent[bucket]) if name.endswith("input_layernorm.weight"))
    name, weight = sent[bucket][place]
    sent[bucket][place] = (name, weight[:-2])
    with (
        route(served) as spoilt,
        pytest.raises(WeightSyncError, match=rf"http://\S+/{call}: .*Attempted to load weight"),
    ):
        spoilt.push(sent, 99)
    assert ask(served, lambda c: c.model_info())["weight_version"] != "99"
    assert_next_push_arrives(served, trained, expected)


def kill_in_a_push(forks: Forks, url: str, model: Path, at: str) -> None:
    trainer = forks.begin(1, "broadcast:stop_in_a_push", url, model, at)
    deadline = time.monotonic() + TIMEOUT
    while "there" not in trainer.stdout:
        assert forks.poll(trainer), trainer.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)  # the server is in the broadcast by then
    forks.kill(trainer)
    assert forks.wait(trainer).status == [-signal.SIGKILL]


@pytest.mark.parametrize(
    "at", ["between begin and end", "in the broadcast", "after the first bucket", "after a wrong bucket"]
)
def test_the_server_accepts_weights_after_a_trainer_was_killed_during_a_sync(
    forks: Forks, served: str, trained: Path, expected: str, at: str
) -> None:
    kill_in_a_push(forks, served, trained, at)
    assert_next_push_arrives(served, trained, expected)


def test_a_killed_trainers_last_bucket_is_not_loaded_over_later_weights(
    forks: Forks, served: str, trained: Path, tiny_model_dir: Path
) -> None:
    """A trainer that syncs by files abandons the session of the one before only after its first sync."""
    before = ask(served, lambda c: c.weights_checksum())
    kill_in_a_push(forks, served, trained, "after the first bucket")
    ask(served, lambda c: c.update_weights_from_disk(str(tiny_model_dir), weight_version=8))
    ask(served, lambda c: c.abandon_weight_update())
    assert ask(served, lambda c: c.weights_checksum()) == before


@pytest.mark.distributed
def test_a_broadcast_holds_two_buckets_on_rank_0_and_an_eighth_of_one_elsewhere(
    forks: Forks, served: str, trained: Path
) -> None:
    """The test is red if a third bucket is there for a moment, as a copy or as a bucket that was not let go."""
    done = forks.run(SUPPORT / "sync_worker.py", "peak", trained, served, "tp=2", ranks=2, together=True)
    assert done.returncode == 0, done.stderr[-9000:]
    found = {line["rank"]: line["peak"] for line in map(json.loads, re.findall(r"\{.*?\}", done.stdout))}
    assert 1.5 * PEAK_BUCKET_BYTES < found[0] <= 2 * PEAK_BUCKET_BYTES
    assert 0 < found[1] <= PEAK_BUCKET_BYTES / 8


def test_a_bucket_is_not_overwritten_while_it_is_broadcast(served: str, trained: Path, expected: str) -> None:
    """The stream below uses the memory of each bucket again for the next but one, as an export does."""
    tensors = list(load_file(trained / "model.safetensors").items())
    rooms = [torch.empty(max(tensor.numel() for _, tensor in tensors)) for _ in range(2)]

    def stream() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for (name, tensor), room in zip(tensors, itertools.cycle(rooms), strict=False):
            view = room[: tensor.numel()].view(tensor.shape)
            yield [(name, view.copy_(tensor))]

    with route(served, *[Fault()] * CALLS_BEFORE_WEIGHTS, *[Fault(delay=0.02)] * 8) as sync:
        sync.push(stream(), 7)
    assert ask(served, lambda c: c.weights_checksum()) == expected


def test_a_server_that_is_gone_is_not_waited_for_when_its_group_is_left(
    monkeypatch: pytest.MonkeyPatch, served: str, trained: Path
) -> None:
    monkeypatch.setattr(fleet, "REACH_SECONDS", 1.0)
    calls = CALLS_BEFORE_WEIGHTS + 2 + 3  # two buckets; end_weight_update, flush_cache, update_weight_version
    with route(served, *[Fault()] * calls, *[Fault(delay=TIMEOUT)] * 2) as sync:
        sync.push(buckets(trained), 7)
        start = time.monotonic()
        sync.close()
        assert time.monotonic() - start < CLOSE_SECONDS / 3
