"""Servers that fail in the middle of a rollout: others sample what they owe. All are proxies to one real server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from sampled_groups import collect, make_prompts
from tiny_models import VOCAB_SIZE

from megatron_rl.data.versions import Versions
from megatron_rl.rollout import client as client_module
from megatron_rl.rollout import fleet as fleet_module
from megatron_rl.rollout.client import RefusedError, RolloutError, SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups

pytestmark = pytest.mark.server
CONCURRENCY = 12
SAMPLING = Sampling(
    samples=3,
    max_response_tokens=8,
    temperature=1.0,
    vocab_size=VOCAB_SIZE,
    versions=Versions(0),
    seed=0,
)
PROMPTS = make_prompts(6)


def meta(change: Callable[[dict[str, Any]], object]) -> Fault:
    return Fault(change=lambda answer: change(answer["meta_info"]))


def without_number(found: dict[str, Any]) -> None:
    found["output_token_logprobs"][0][0] = None


def shortened(answer: dict[str, Any]) -> None:
    """Makes the answer one of a pool of tokens that was full."""
    if answer["meta_info"]["finish_reason"]["type"] == "length":
        answer["output_ids"] = answer["output_ids"][:-1]
        answer["meta_info"]["output_token_logprobs"].pop()
        answer["meta_info"]["completion_tokens"] -= 1
        answer["meta_info"]["weight_versions"][-1]["end"] -= 1
    else:
        answer["output_ids"] = []


FAULTS = {
    "closed": Fault(drop=True),
    "lost": Fault(lose=True),
    "500": Fault(status=500),
    "502": Fault(status=502),
    "503": Fault(status=503),
    "truncated": Fault(raw=lambda content: content[: len(content) // 2]),
    "not SGLang": Fault(raw=lambda _: b"<html>", content_type="text/html"),
    "too few log-probs": meta(lambda found: found["output_token_logprobs"].pop()),
    "no number": meta(without_number),
    "stale version": meta(lambda found: found["weight_versions"][0].update(version="7")),
    "cut short": Fault(change=shortened),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_other_servers_sample_what_a_faulty_one_owes(
    served: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    monkeypatch.setattr(client_module, "MAX_TRIES", 2)
    proxies = [FaultProxy(served, Fault(), always=fault), FaultProxy(served)]
    with caplog.at_level(logging.WARNING):
        groups = collect(proxies, PROMPTS, SAMPLING, CONCURRENCY)
    assert [(group.index, group.prompt) for group in groups] == PROMPTS
    for group in groups:
        assert [sample.index for sample in group.samples] == [0, 1, 2]
        assert all(sample.finish_reason in ("stop", "length") for sample in group.samples)
    asked = [body["input_ids"] for path, body in proxies[1].seen if path == "/generate"]
    assert len(asked) >= 3 * len(PROMPTS) - 1  # the first answer of the faulty server is right
    (warning,) = [record for record in caplog.records if "ejected" in record.message]
    assert proxies[0].url in warning.message


def test_a_server_that_hangs_is_ejected(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "PROBE_SECONDS", 2.0)
    monkeypatch.setattr(fleet_module, "MISSES", 1)
    start = time.monotonic()
    proxies = [FaultProxy(served, always=Fault(delay=1000.0)), FaultProxy(served)]
    groups = collect(proxies, PROMPTS, SAMPLING, CONCURRENCY, deadline=500.0)
    assert all(len(group.samples) == 3 for group in groups)
    assert time.monotonic() - start < 60


def test_a_slow_server_that_gives_signs_of_life_is_not_ejected(
    served: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang gives no sign within a second, so probes are faster here than its answers."""
    monkeypatch.setattr(fleet_module, "PROBE_SECONDS", 3.0)
    monkeypatch.setattr(fleet_module, "MISSES", 1)
    slow = [Fault(delay=8.0)] * 3  # its first group; then probes
    proxies = [FaultProxy(served, *slow), FaultProxy(served)]
    collect(proxies, PROMPTS, SAMPLING, CONCURRENCY)
    assert any(path == "/health" for path, _ in proxies[0].seen)
    assert "ejected" not in caplog.text


def test_a_paused_server_is_not_asked_for_a_sign_of_life(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not give one: no request gets a token during a weight sync."""
    monkeypatch.setattr(fleet_module, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(fleet_module, "MISSES", 1)

    def pause(fleet: Fleet) -> None:
        fleet.paused = True

    proxy = FaultProxy(served, *[Fault(delay=3.0)] * CONCURRENCY)
    collect([proxy], PROMPTS, SAMPLING, CONCURRENCY, see=pause)
    assert not any(path == "/health" for path, _ in proxy.seen)


def test_each_server_is_watched_once_however_often_it_has_nothing_to_do(served: str) -> None:
    watches: list[int] = []

    def count(_: Fleet) -> None:
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
        watches.append(names.count("Fleet._watch"))

    collect([FaultProxy(served)], PROMPTS[:1], SAMPLING, CONCURRENCY, repeats=4, see=count)
    assert watches == [0, 1]


def test_the_errors_of_all_servers_are_told_if_none_is_left(served: str) -> None:
    proxies = [FaultProxy(served, always=Fault(status=500)), FaultProxy(served, always=meta(without_number))]
    with pytest.raises(RolloutError) as caught:
        collect(proxies, PROMPTS, SAMPLING, CONCURRENCY)
    text = str(caught.value)
    assert text.startswith("no rollout server is left:\n")
    assert f"{proxies[0].url}/generate: status 500" in text
    assert f"{proxies[1].url}: request" in text


def test_what_one_server_refuses_is_not_asked_of_another(served: str, caplog: pytest.LogCaptureFixture) -> None:
    proxies = [FaultProxy(served, Fault(status=400)), FaultProxy(served)]
    with pytest.raises(RefusedError, match="status 400"):
        collect(proxies, PROMPTS, SAMPLING, CONCURRENCY)
    assert "ejected" not in caplog.text


@pytest.mark.parametrize("seconds", [2, None])
def test_a_busy_server_is_asked_again_when_it_says(served: str, seconds: int | None) -> None:
    proxy = FaultProxy(served, Fault(status=429, retry_after=seconds))
    start = time.monotonic()
    groups = collect([proxy], PROMPTS, SAMPLING, CONCURRENCY)
    assert all(len(group.samples) == 3 for group in groups)
    assert time.monotonic() - start >= (seconds or 0)


def test_a_rollout_that_is_cancelled_aborts_its_requests(served: str) -> None:
    async def run() -> FaultProxy:
        async with FaultProxy(served, always=Fault(delay=600.0)) as proxy:
            client = SGLangClient(proxy.url)
            rollout = asyncio.ensure_future(rollout_groups(Sampler(Fleet([client]), CONCURRENCY), PROMPTS, SAMPLING))
            while len(proxy.seen) < CONCURRENCY:
                await asyncio.sleep(0.01)
            rollout.cancel()
            await asyncio.wait([rollout])
            assert rollout.cancelled()
            await client.close()
            return proxy

    proxy = asyncio.run(run())
    asked = [body["rid"] for path, body in proxy.seen if path == "/generate"]
    aborted = [body["rid"] for path, body in proxy.seen if path == "/abort_request"]
    assert len(set(asked)) == CONCURRENCY
    assert sorted(aborted) == sorted(asked)
