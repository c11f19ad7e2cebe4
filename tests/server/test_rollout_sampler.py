"""Groups from a real server: their order, their distribution over servers, aborts, failures and request seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sampled_groups
from fault_proxy import Fault, FaultProxy
from sampled_groups import make_prompts
from tiny_models import VOCAB_SIZE

from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.data.versions import Versions, VersionSpan
from megatron_rl.rollout.client import Completion, RolloutError
from megatron_rl.rollout.sampler import Sampling, request_seed
from megatron_rl.rollout.turns import append_completion

server = pytest.mark.server
SAMPLING = Sampling(
    samples=4,
    max_response_tokens=12,
    temperature=1.0,
    vocab_size=VOCAB_SIZE,
    versions=Versions(0),
    seed=0,
)
PROMPTS = make_prompts(6, first=10)


def collect(
    url: str,
    *faults: Fault,
    sampling: Sampling = SAMPLING,
    concurrency: int = 16,
    servers: int = 1,
    deadline: float = 60.0,
    seen_by: Callable[[list[FaultProxy]], None] = lambda proxies: None,
) -> tuple[list[Group], list[FaultProxy]]:
    """Collects groups through `servers` proxies to one server, the first of them with these faults. `seen_by` gets the
    proxies before they start."""

    proxies = [FaultProxy(url, *(faults if n == 0 else ())) for n in range(servers)]
    seen_by(proxies)
    return sampled_groups.collect(proxies, PROMPTS, sampling, concurrency, deadline=deadline), proxies


def bodies(proxy: FaultProxy) -> list[dict[str, Any]]:
    return [body for path, body in proxy.seen if path == "/generate"]


@server
def test_groups_are_returned_in_prompt_order(served: str) -> None:
    groups, _ = collect(served)
    assert [(group.index, group.prompt) for group in groups] == PROMPTS
    for group in groups:
        assert [sample.index for sample in group.samples] == [0, 1, 2, 3]
        assert len({tuple(sample.response_ids) for sample in group.samples}) > 1
        for sample in group.samples:
            n = len(group.prompt.token_ids)
            assert tuple(sample.token_ids[:n]) == group.prompt.token_ids
            assert not sample.loss_mask[:n].any()
            assert sample.loss_mask[n:].all()
            assert (sample.rollout_logprobs[n:] < 0).all()
            assert sample.versions == (VersionSpan(0, n, len(sample.token_ids)),)
            assert sample.finish_reason in ("stop", "length")


@server
def test_samples_have_the_most_likely_tokens_that_were_asked_for(served: str) -> None:
    groups, (proxy,) = collect(served, sampling=dataclasses.replace(SAMPLING, top_k=3))
    assert all(body["top_logprobs_num"] == 3 for body in bodies(proxy))
    in_head = 0
    for sample in (sample for group in groups for sample in group.samples):
        top = sample.top_tokens
        assert top is not None
        assert top.ids.shape == (len(sample.response_ids), 3)
        own = top.ids == sample.response_ids[:, None]
        in_head += own.sum()
        logprobs = sample.rollout_logprobs[len(sample.prompt.token_ids) :, None]
        assert (top.logprobs == np.broadcast_to(logprobs, own.shape))[own].all()
        assert (logprobs[~own.any(axis=1), 0] <= top.logprobs[~own.any(axis=1), -1]).all()
    assert in_head > 0


@server
def test_groups_are_spread_over_servers_and_each_group_stays_on_one(served: str) -> None:
    _, proxies = collect(served, servers=3, concurrency=24)
    assert [len(bodies(proxy)) for proxy in proxies] == [8, 8, 8]
    prompts = [{tuple(body["input_ids"]) for body in bodies(proxy)} for proxy in proxies]
    assert [len(group) for group in prompts] == [2, 2, 2]


@server
def test_a_slow_server_gets_fewer_groups(served: str) -> None:
    """The first server answers only after the second one has been asked for all the other groups."""
    proxies: list[FaultProxy] = []
    slow = [Fault(until=lambda: len(bodies(proxies[1])) == 20)] * 4
    collect(served, *slow, servers=2, concurrency=8, seen_by=proxies.extend)
    assert [len(bodies(proxy)) for proxy in proxies] == [4, 20]


@server
def test_the_number_of_concurrent_requests_is_limited(served: str) -> None:
    _, (proxy,) = collect(served, concurrency=3)
    assert proxy.most_in_flight == 3


ABORT = Fault(change=lambda answer: answer["meta_info"]["finish_reason"].update(type="abort"))


@server
def test_an_aborted_response_is_sampled_to_its_end(served: str) -> None:
    groups, (proxy,) = collect(served, ABORT, ABORT)
    assert len(bodies(proxy)) == 26
    assert all(sample.finish_reason != "abort" for group in groups for sample in group.samples)


@server
def test_a_response_that_is_always_aborted_is_an_error(served: str) -> None:
    with pytest.raises(RolloutError, match=r"prompt 'p\d': the server aborted it 3 times"):
        collect(served, *[ABORT] * 100)


@server
def test_one_bad_answer_ends_the_rollout_at_once(served: str) -> None:
    slow = [Fault(delay=600.0)] * 23
    start = time.monotonic()
    with pytest.raises(RolloutError, match="status 500"):
        collect(served, Fault(status=500), *slow)
    assert time.monotonic() - start < 30.0


@server
def test_the_deadline_covers_repeated_slow_aborts(served: str) -> None:
    slow_abort = dataclasses.replace(ABORT, delay=0.8)
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"no (complete response|answer) within 1 s"):
        collect(served, *[slow_abort] * 100, deadline=1.0)
    assert time.monotonic() - start < 15.0


@server
def test_each_request_has_its_own_seed_and_a_second_run_repeats_the_seeds(served: str) -> None:
    seeds = [[body["sampling_params"]["sampling_seed"] for body in bodies(collect(served)[1][0])] for _ in range(2)]
    assert len(set(seeds[0])) == 24
    assert set(seeds[0]) == set(seeds[1])


def test_seeds_depend_on_run_weight_version_group_and_sample() -> None:
    changed = [
        request_seed(seed, version, group, number)
        for seed, version, group, number in [(0, 0, 1, 2), (0, 0, 2, 1), (0, 0, 1, 3), (1, 0, 1, 2), (0, 1, 1, 2)]
    ]
    changed.append(request_seed(0, 0, 1, 2, evaluates=True))
    assert len(set(changed)) == len(changed)
    assert all(0 <= seed < 2**63 for seed in changed)


def test_version_spans_of_a_sample_count_from_the_start_of_its_prompt() -> None:
    prompt = Prompt("p", "", (5, 6, 7), "", "")
    completion = Completion((8, 9, 1), (-1.0, -2.0, -3.0), "stop", (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)), "")
    sample = append_completion(Sample.start(prompt, 2), completion)
    assert sample.token_ids.tolist() == [5, 6, 7, 8, 9, 1]
    assert sample.rollout_logprobs.tolist() == [0, 0, 0, -1, -2, -3]
    assert sample.versions == (VersionSpan(3, 3, 5), VersionSpan(4, 5, 6))
    assert (sample.finish_reason, sample.index) == ("stop", 2)
