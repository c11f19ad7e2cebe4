"""The rollout client and sampler against a real server, and against its answers with one thing made wrong."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from tiny_models import EOS, VOCAB_SIZE, reference_logprobs

from megatron_rl.data.sample import Prompt
from megatron_rl.rollout.client import RolloutError, SGLangClient
from megatron_rl.rollout.evaluate import pass_at_k
from megatron_rl.rollout.sampler import Sampling, rollout_groups
from megatron_rl.rollout.server import Server, ServerError, ServerOptions, free_ports

PROMPT = Prompt("p", "", (5, 9, 12, 30, 7), "", "arithmetic")
VERSIONS = frozenset({3})


@pytest.fixture
def version_3(tiny_model_dir: Any, tiny_server: Server) -> Server:
    async def load() -> None:
        async with SGLangClient(tiny_server.url, deadline=60.0) as client:
            await client.update_weights_from_disk(str(tiny_model_dir), weight_version=3)

    asyncio.run(load())
    return tiny_server


@pytest.mark.server
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_the_tempered_model(
    version_3: Server, tiny_model_dir: Any, temperature: float
) -> None:
    sampling = Sampling(
        samples=6,
        max_response_tokens=20,
        temperature=temperature,
        concurrency=4,
        vocab_size=VOCAB_SIZE,
        versions=VERSIONS,
    )

    async def run() -> Any:
        async with SGLangClient(version_3.url, deadline=60.0) as client:
            return await rollout_groups([client], [(0, PROMPT), (1, PROMPT)], sampling)

    groups = asyncio.run(run())
    assert [group.index for group in groups] == [0, 1]
    samples = [sample for group in groups for sample in group.samples]
    assert len(samples) == 12
    for sample in samples:
        n = sample.response_tokens
        expected = reference_logprobs(tiny_model_dir, sample.token_ids.tolist(), temperature)[-n:]
        np.testing.assert_allclose(sample.rollout_logprobs[-n:], expected.numpy(), atol=2e-5)
        assert [(v.version, v.end - v.start) for v in sample.versions] == [(3, n)]
        # The end-of-sequence token is part of what was sampled, and is trained on.
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == EOS)
        assert sample.finish_reason == "stop" or n == 20
    assert len({tuple(s.token_ids.tolist()) for s in samples}) > 1


def answer_of(server: Server) -> dict[str, Any]:
    body = {
        "input_ids": list(PROMPT.token_ids),
        "sampling_params": {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
    }
    return dict(httpx.post(server.url + "/generate", json=body, timeout=60.0).json())


def entry(answer: dict[str, Any]) -> Any:
    return answer["meta_info"]["output_token_logprobs"]


@pytest.mark.server
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a["output_ids"].pop(), "output_token_logprobs: found 6 entries, expected 5"),
        (lambda a: entry(a)[2].__setitem__(1, (entry(a)[2][1] + 1) % VOCAB_SIZE), "other token ids"),
        (lambda a: entry(a)[1].__setitem__(0, float("nan")), r"output_token_logprobs\[1\]: found nan"),
        (lambda a: entry(a)[1].__setitem__(0, 0.5), r"output_token_logprobs\[1\]: found 0.5"),
        (lambda a: entry(a)[0].__setitem__(0, None), r"output_token_logprobs\[0\]: found None"),
        (lambda a: a["meta_info"]["finish_reason"].update(type="tired"), "finish_reason: found 'tired'"),
        (lambda a: a["meta_info"]["weight_versions"][0].update(version="4"), "weight_versions: found '4'"),
        (lambda a: a["meta_info"]["weight_versions"][0].update(end=5), "spans up to 5, expected up to 6"),
        (lambda a: a["meta_info"].pop("output_token_logprobs"), "no such field"),
        (lambda a: [a["output_ids"].__setitem__(0, 999), entry(a)[0].__setitem__(1, 999)], "output_ids: found 999"),
    ],
)
def test_an_answer_that_does_not_hold_together_is_refused(
    version_3: Server, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    good = answer_of(version_3)
    client = SGLangClient(version_3.url)
    assert len(client._completion(good, VOCAB_SIZE, VERSIONS).token_ids) == 6
    bad = copy.deepcopy(good)
    spoil(bad)
    with pytest.raises(RolloutError, match=message):
        client._completion(bad, VOCAB_SIZE, VERSIONS)


def test_a_server_that_is_not_there_is_tried_again_and_then_given_up() -> None:
    (port,) = free_ports(1)

    async def run() -> None:
        async with SGLangClient(f"http://127.0.0.1:{port}", deadline=1.5) as client:
            await client.score([1, 2, 3])

    with pytest.raises(RolloutError, match=rf"127\.0\.0\.1:{port}/generate: "):
        asyncio.run(run())


@pytest.mark.server
def test_a_model_that_does_not_exist_gives_one_error_with_the_log(tmp_path: Any) -> None:
    (port,) = free_ports(1)
    server = Server(ServerOptions(model=tmp_path / "absent", port=port, threads=1), tmp_path / "server.log")
    try:
        with pytest.raises(ServerError, match="absent"):
            server.wait_ready(120.0)
    finally:
        server.stop()


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    """Against counting all subsets: 1 - C(n - c, k) / C(n, k)."""
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(8, 0, 4) == 0.0
    assert pass_at_k(8, 5, 4) == 1.0
    with pytest.raises(ValueError, match="k = 3 of 2"):
        pass_at_k(2, 1, 3)
