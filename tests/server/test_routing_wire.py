"""Routes that a real server returns, against the choices of transformers' routers on the same tokens."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.versions import Versions
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rollout.client import Completion, RolloutError, SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.routing.wire import RouteSpec

pytestmark = pytest.mark.server
MARGIN = 1e-4
"""Largest difference of router logits at which two fp32 engines may choose different experts."""
# The longest prompt is prefilled in three parts.
PROMPTS = [np.random.default_rng(n).integers(2, VOCAB_SIZE, length).tolist() for n, length in enumerate([1, 4, 9, 40])]
ENDLESS = np.random.default_rng(0).integers(2, VOCAB_SIZE, 9).tolist()  # its greedy response does not end
T = TypeVar("T")


def call(url: str, function: Callable[[SGLangClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with SGLangClient(url, deadline=60.0) as client:
            return await function(client)

    return asyncio.run(run())


def generate(client: SGLangClient, prompt: list[int], spec: RouteSpec | None, **changes: Any) -> Awaitable[Completion]:
    arguments = {"max_new_tokens": 20, "temperature": 1.0, "vocab_size": VOCAB_SIZE, "versions": range(9), **changes}
    return client.generate(prompt, routes=spec, **arguments)


def spec_of(routed_model_dir: Path) -> RouteSpec:
    return RouteSpec.of(read_architecture(routed_model_dir))


@functools.cache
def transformers_model(routed_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(routed_model_dir, dtype=torch.float32, attn_implementation="eager")


def assert_routed_as_transformers(routed_model_dir: Path, prompt: list[int], completion: Completion) -> tuple[int, int]:
    """Compares rows and layers, with experts in the order of their scores, unless experts nearly tie.

    Returns how many were compared, and how many there are.
    """
    trace, tokens = completion.trace, [*prompt, *completion.token_ids]
    assert trace is not None
    assert trace.rows == len(tokens) - 1
    assert trace.layers == (0, 1, 2)
    assert trace.present.all()
    with torch.no_grad():
        logits = transformers_model(routed_model_dir)(torch.tensor([tokens]), output_router_logits=True).router_logits
    scores, expected = torch.stack(logits, dim=1)[:-1].sort(dim=-1, descending=True)
    clear = (scores.diff(dim=-1)[..., : trace.top_k] < -MARGIN).all(-1).numpy()
    assert clear.any()
    assert np.array_equal(trace.experts[clear], expected[..., : trace.top_k].numpy()[clear])
    return int(clear.sum()), clear.size


def test_routes_of_a_batch_equal_transformers_routes(routed_url: str, routed_model_dir: Path) -> None:
    """Prompts of different lengths, each sampled several times: repeated prompts hit the prefix cache."""
    prompts = PROMPTS * 4

    async def sample(client: SGLangClient) -> list[Completion]:
        return await asyncio.gather(*(generate(client, prompt, spec_of(routed_model_dir)) for prompt in prompts))

    completions = call(routed_url, sample)
    counts = [assert_routed_as_transformers(routed_model_dir, p, c) for p, c in zip(prompts, completions, strict=True)]
    compared, routed = np.sum(counts, axis=0)
    assert compared > 0.98 * routed > 1000
    # The comparison can fail: a trace shifted by one row is different.
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.trace is not None
        if completion.trace.rows > 2:
            shifted = np.roll(completion.trace.experts, 1, axis=0)
            assert not np.array_equal(shifted, completion.trace.experts)
            assert len(prompt) + len(completion.token_ids) - 1 == completion.trace.rows


def test_a_response_with_a_prefix_cache_hit_has_all_route_rows(routed_url: str, routed_model_dir: Path) -> None:
    async def twice(client: SGLangClient) -> list[Completion]:
        await client.flush_cache()
        return [await generate(client, PROMPTS[3], spec_of(routed_model_dir), temperature=0.0) for _ in range(2)]

    first, second = call(routed_url, twice)
    assert first.token_ids == second.token_ids
    for completion in (first, second):
        assert_routed_as_transformers(routed_model_dir, PROMPTS[3], completion)


def test_an_aborted_response_has_routes_for_the_tokens_that_were_computed(
    routed_url: str, routed_model_dir: Path
) -> None:
    async def abort(client: SGLangClient, delay: float) -> Completion:
        answer = asyncio.create_task(long_answer(client, routed_model_dir))
        await asyncio.sleep(delay)
        await client.pause_generation("abort")
        await client.continue_generation()
        return await answer

    completion = interrupted(routed_url, abort, lambda c: 0 < len(c.token_ids) < 400)
    assert completion.finish_reason == "abort"
    assert 0 < len(completion.token_ids) < 400
    assert_routed_as_transformers(routed_model_dir, ENDLESS, completion)


def interrupted(
    routed_url: str, interrupt: Callable[[SGLangClient, float], Any], while_running: Callable[[Completion], bool]
) -> Completion:
    """Returns a long answer that was interrupted while it ran. On a busy machine the first attempts may come too early
    or too late."""
    for delay in (0.3, 0.1, 0.05, 0.02, 0.6, 1.2, 0.2, 0.01):

        def after(client: SGLangClient, delay: float = delay) -> Any:
            return interrupt(client, delay)

        completion = call(routed_url, after)
        if while_running(completion):
            return completion
    raise AssertionError("no answer was running when it was to be interrupted")


async def long_answer(client: SGLangClient, routed_model_dir: Path) -> Completion:
    return await generate(client, ENDLESS, spec_of(routed_model_dir), max_new_tokens=400, temperature=0.0)


@pytest.mark.parametrize(("mode", "versions"), [("in_place", (0, 1)), ("retract", (1, 2))])
def test_route_rows_have_the_weight_version_that_computed_them(
    routed_url: str, routed_model_dir: Path, mode: Any, versions: Any
) -> None:
    """The weights do not change, so routes can be compared. A retraction drops the old version's rows, as they were
    computed again."""
    before, after = versions

    async def update(client: SGLangClient, delay: float) -> Completion:
        await client.update_weight_version(before)
        answer = asyncio.create_task(long_answer(client, routed_model_dir))
        await asyncio.sleep(delay)
        await client.pause_generation(mode)
        await client.update_weight_version(after)
        await client.continue_generation()
        return await answer

    completion = interrupted(routed_url, update, lambda c: len(c.versions) == 2)
    trace = completion.trace
    assert trace is not None
    sampled, rows = completion.versions, trace.versions
    assert [span.version for span in sampled] == [span.version for span in rows] == [before, after]
    assert rows[0].end == len(ENDLESS) - 1 + sampled[0].end
    assert trace.present[rows[0].end :].all()
    assert trace.present[: rows[0].end].all() == (mode == "in_place")
    assert trace.present[: rows[0].end].any() == (mode == "in_place")


def test_groups_have_traces_only_if_routes_are_requested(routed_url: str, routed_model_dir: Path) -> None:
    prompts = [(n, Prompt(f"p{n}", "", tuple(ids), "", "")) for n, ids in enumerate(PROMPTS)]
    for routes in (None, spec_of(routed_model_dir)):
        sampling = Sampling(
            samples=2,
            max_response_tokens=6,
            temperature=1.0,
            vocab_size=VOCAB_SIZE,
            versions=Versions(8, lag=8),
            seed=0,
            routes=routes,
        )

        def sample(client: SGLangClient, sampling: Sampling = sampling) -> Awaitable[list[Group]]:
            return rollout_groups(Sampler(Fleet([client]), 8), prompts, sampling)

        for group in call(routed_url, sample):
            for each in group.samples:
                assert (each.trace is None) == (routes is None)
                assert each.trace is None or each.trace.rows == len(each.token_ids) - 1


def test_the_error_names_a_server_started_without_the_routes_flag(served: str, tiny_model_dir: Path) -> None:
    with pytest.raises(RolloutError, match=r"request \w+: routed_experts: .*--enable-return-routed-experts") as caught:
        call(served, lambda client: generate(client, PROMPTS[1], spec_of(tiny_model_dir)))
    assert str(caught.value).startswith(served)
    assert call(served, lambda client: generate(client, PROMPTS[1], None)).trace is None
