"""Responses that a real server aborts: what was sampled is kept, and sampling goes on from there."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_proxy import Fault, FaultProxy
from sampled_groups import collect, make_prompts
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM

from megatron_rl.data.sample import Group, Sample
from megatron_rl.data.versions import Versions
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.rollout.server import Server, ServerOptions, free_ports
from megatron_rl.routing.wire import RouteSpec

pytestmark = pytest.mark.server
LONGEST = 300
MARGIN = 1e-4
"""Largest difference of router logits at which two fp32 engines may choose different experts."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The weights of versions 0 and 1."""
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / f"version-{seed}", experts_per_token=3, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def server_url(forked_servers: None, models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    options = ServerOptions(
        model=models[0], port=port, dtype="fp32", max_total_tokens=4096, threads=1, return_routed_experts=True
    )
    server = Server(options, tmp_path_factory.mktemp("logs") / "server.log")
    try:
        server.wait_ready(120.0)
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def url(server_url: str, models: list[Path]) -> str:
    """URL of the server, reset to weight version 0."""
    asyncio.run(load(server_url, models))
    return server_url


async def load(url: str, models: list[Path]) -> None:
    async with SGLangClient(url, deadline=60.0) as client:
        await client.update_weights_from_disk(str(models[0]), weight_version=0)


def sampling_of(models: list[Path], **changes: Any) -> Sampling:
    return dataclasses.replace(
        Sampling(
            samples=2,
            max_response_tokens=LONGEST,
            temperature=1.0,
            vocab_size=VOCAB_SIZE,
            versions=Versions(1, lag=1),
            seed=0,
            routes=RouteSpec.of(read_architecture(models[0])),
            top_k=2,
        ),
        **changes,
    )


async def sample_over_a_sync(url: str, models: list[Path], delay: float) -> list[Group]:
    """Aborts everything after `delay` seconds, as a server does before it gives its memory back, and goes on with other
    weights."""
    await load(url, models)
    async with SGLangClient(url, deadline=60.0) as client:
        started = asyncio.create_task(
            rollout_groups(Sampler(Fleet([client]), 99), make_prompts(6), sampling_of(models))
        )
        await asyncio.sleep(delay)
        await client.pause_generation("abort")
        await client.update_weights_from_disk(str(models[1]), weight_version=1)
        await client.continue_generation()
        return await started


def teacher_forced(model: Path, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probs of tokens 1 and later, and router logits [rows, layers, experts], of transformers."""
    tokens = torch.tensor(sample.token_ids[None], dtype=torch.long)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        out = network(tokens, output_router_logits=True)
    logprobs = out.logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return logprobs.numpy(), torch.stack(out.router_logits, dim=1)[:-1].numpy()


def test_an_aborted_response_goes_on_from_its_tokens_with_the_weights_of_a_sync(url: str, models: list[Path]) -> None:
    """Each token has log-prob and experts of its own version's weights, although a later pass computed all again."""
    for delay in (0.4, 0.2, 0.8, 0.1, 1.6):
        groups = asyncio.run(sample_over_a_sync(url, models, delay))
        samples = [sample for group in groups for sample in group.samples]
        mixed = [sample for sample in samples if [span.version for span in sample.versions] == [0, 1]]
        if len(mixed) >= 2:
            break
    else:
        raise AssertionError("no response was in flight when all were aborted")
    assert all(len(sample.response_ids) <= LONGEST and sample.finish_reason != "abort" for sample in samples)
    for sample in mixed[:4]:
        first = len(sample.prompt.token_ids)
        old, new = sample.versions
        assert (old.start, old.end, new.end) == (first, new.start, len(sample.token_ids))
        assert sample.loss_mask[first:].all()
        assert sample.finish_reason == ("length" if len(sample.response_ids) == LONGEST else "stop")
        assert sample.top_tokens is not None
        assert np.isfinite(sample.top_tokens.logprobs).all()
        assert sample.trace is not None
        assert sample.trace.rows == len(sample.token_ids) - 1
        assert sample.trace.present.all()
        assert [(span.version, span.end) for span in sample.trace.versions] == [(0, old.end - 1), (1, new.end - 1)]
        for span, model in ((old, models[0]), (new, models[1])):
            logprobs, routers = teacher_forced(model, sample)
            found = sample.rollout_logprobs[span.start : span.end]
            np.testing.assert_allclose(found, logprobs[span.start - 1 : span.end - 1], atol=1e-4)
            rows = slice(span.start - 1, span.end - 1)
            expected = np.argsort(-routers[rows], axis=-1, kind="stable")[..., :3]
            clear = (np.diff(-np.sort(-routers[rows], axis=-1), axis=-1)[..., :3] < -MARGIN).all(-1)
            assert clear.mean() > 0.9
            assert np.array_equal(sample.trace.experts[rows][clear], expected[clear])


def aborted(answer: dict[str, Any]) -> None:
    answer["meta_info"]["finish_reason"] = {"type": "abort"}


def aborted_without_routes(answer: dict[str, Any]) -> None:
    aborted(answer)
    del answer["meta_info"]["routed_experts"]


def bodies(*proxies: FaultProxy) -> list[dict[str, Any]]:
    return [body for proxy in proxies for path, body in proxy.seen if path == "/generate"]


@pytest.mark.parametrize(
    ("aborts", "failures"), [(1, ()), (2, (Fault(status=500),))], ids=["the same server", "another server"]
)
def test_the_continuation_asks_for_the_rest_after_all_tokens_but_the_last(
    url: str, models: list[Path], aborts: int, failures: tuple[Fault, ...]
) -> None:
    """SGLang does not look whether the last token of an aborted response ends it."""
    answered: list[list[int]] = []

    def change(answer: dict[str, Any]) -> None:
        answered.append(answer["output_ids"])
        aborted(answer)

    proxies = [FaultProxy(url, *[Fault(change=change)] * aborts, *failures), FaultProxy(url)]
    prompts = make_prompts(1)
    (group,) = collect(proxies, prompts, sampling_of(models, samples=1, max_response_tokens=40), 1)
    prompt = list(prompts[0][1].token_ids)
    asked = [body["input_ids"] for body in bodies(*proxies)]
    rests = [body["sampling_params"]["max_new_tokens"] for body in bodies(*proxies)]
    assert asked[:2] == [prompt, prompt + answered[0][:-1]]
    assert len(asked[1]) > len(prompt)
    assert len(asked) == aborts + len(failures) + 1
    assert [len(ids) + rest for ids, rest in zip(asked, rests, strict=True)] == [len(prompt) + 40] * len(asked)
    assert group.samples[0].token_ids.tolist()[: len(asked[-1])] == asked[-1]
    assert len({body["sampling_params"]["sampling_seed"] for body in bodies(*proxies)}) == 1


def aborted_under_speculative_decoding(answer: dict[str, Any]) -> None:
    aborted(answer)
    answer["meta_info"]["spec_verify_ct"] = 5


@pytest.mark.parametrize("change", [aborted_without_routes, aborted_under_speculative_decoding])
def test_tokens_that_lack_routes_or_that_passes_sampled_together_are_not_kept(
    url: str, models: list[Path], change: Callable[[dict[str, Any]], None]
) -> None:
    proxy = FaultProxy(url, Fault(change=change))
    (group,) = collect([proxy], make_prompts(1), sampling_of(models, samples=1, max_response_tokens=40), 1)
    first, second = bodies(proxy)
    assert first["input_ids"] == second["input_ids"]
    trace = group.samples[0].trace
    assert trace is not None
    assert trace.present.all()
