"""The server's log-probs against transformers': they are mu, and the CPU layer does not make them wrong."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from tiny_models import EOS, VOCAB_SIZE, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.client import Completion, SGLangClient

pytestmark = pytest.mark.server
BOUND = 2e-5  # fp32; a wrong expert, temperature or weight version gives differences of at least 1e-2
PROMPTS = [np.random.default_rng(n).integers(2, VOCAB_SIZE, 5 + 3 * n).tolist() for n in range(6)]


@functools.cache
def transformers_model(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


def reference(model_dir: Path, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """Returns transformers' log-probs [n, vocab] of the token that follows each of the n tokens."""
    with torch.no_grad():
        return (
            (transformers_model(model_dir)(torch.tensor([token_ids])).logits[0] / temperature).log_softmax(-1).numpy()
        )


def difference(model_dir: Path, prompt: list[int], completion: Completion, temperature: float) -> float:
    response = list(completion.token_ids)
    expected = reference(model_dir, prompt + response, temperature)[len(prompt) - 1 : -1]
    return float(np.abs(expected[np.arange(len(response)), response] - completion.logprobs).max())


def sample(url: str, temperatures: list[float], repeats: int = 1, max_new_tokens: int = 40) -> list[Completion]:
    """Samples all prompts `repeats` times at once, cycling through the temperatures."""

    async def run() -> list[Completion]:
        async with SGLangClient(url, deadline=60.0) as client:
            calls = [
                client.generate(
                    prompt,
                    max_new_tokens=max_new_tokens,
                    temperature=temperatures[number % len(temperatures)],
                    vocab_size=VOCAB_SIZE,
                    versions={0},
                )
                for number, prompt in enumerate(PROMPTS * repeats)
            ]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_sampled_log_probs_come_from_the_tempered_distribution(
    served: str, tiny_model_dir: Path, temperature: float
) -> None:
    completions = sample(served, [temperature])

    def largest(at: float) -> float:
        pairs = zip(PROMPTS, completions, strict=True)
        return max(difference(tiny_model_dir, prompt, completion, at) for prompt, completion in pairs)

    assert largest(temperature) < BOUND
    # The bound is small enough to notice a wrong temperature.
    assert largest(temperature * 1.01) > 100 * BOUND


def test_greedy_and_sampled_requests_in_one_batch_are_both_right(served: str, tiny_model_dir: Path) -> None:
    """SGLang then samples with a top-k for each row, but still returns log-probs from before the top-k."""
    completions = sample(served, [0.0, 0.7])
    for number, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        if number % 2:
            assert difference(tiny_model_dir, prompt, completion, 0.7) < BOUND
        else:
            expected = reference(tiny_model_dir, prompt + list(completion.token_ids))[len(prompt) - 1 : -1]
            assert (expected.argmax(-1) == completion.token_ids).all()


def test_log_probs_do_not_depend_on_the_prefix_cache(served: str, tiny_model_dir: Path) -> None:
    first, again = sample(served, [0.0]), sample(served, [0.0])
    for a, b in zip(first, again, strict=True):
        assert a.token_ids == b.token_ids
        assert np.abs(np.subtract(a.logprobs, b.logprobs)).max() < BOUND


def test_tokens_are_sampled_from_the_whole_distribution(served: str, tiny_model_dir: Path) -> None:
    """A chi-squared test of 1,000 first tokens against their probabilities shows that no top-p or top-k is applied."""

    async def run() -> list[int]:
        async with SGLangClient(served, deadline=60.0) as client:
            calls = [
                client.generate(PROMPTS[0], max_new_tokens=1, temperature=1.5, vocab_size=VOCAB_SIZE, versions={0})
                for _ in range(1000)
            ]
            return [completion.token_ids[0] for completion in await asyncio.gather(*calls)]

    counts = np.bincount(asyncio.run(run()), minlength=VOCAB_SIZE)
    expected = 1000 * np.exp(reference(tiny_model_dir, PROMPTS[0], 1.5)[-1])
    # The rarest tokens, which a top-p or top-k would cut, form one class.
    order = np.argsort(expected)
    rare = order[np.cumsum(expected[order]) <= 50]
    common = np.setdiff1d(order, rare)
    observed = np.append(counts[common], counts[rare].sum())
    wanted = np.append(expected[common], expected[rare].sum())
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(observed) - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def test_a_response_follows_from_its_seed_whatever_the_server_computes_beside_it(served: str) -> None:
    async def run() -> tuple[list[list[int]], list[list[int]]]:
        async with SGLangClient(served, deadline=60.0) as client:

            async def ask(number: int) -> list[int]:
                completion = await client.generate(
                    PROMPTS[0], max_new_tokens=40, temperature=1.0, vocab_size=VOCAB_SIZE, versions={0}, seed=number % 8
                )
                return list(completion.token_ids)

            return [await ask(number) for number in range(8)], await asyncio.gather(*map(ask, range(24)))

    alone, together = asyncio.run(run())
    assert len({tuple(ids) for ids in alone}) == 8
    assert together == alone * 3


def test_a_response_follows_from_its_seed_beside_requests_with_filters(served: str) -> None:
    """Greedy requests, and those of other programs with top_k, top_p and min_p, are in the same batches."""

    async def run() -> tuple[list[int], list[int]]:
        async with SGLangClient(served, deadline=60.0) as client, httpx.AsyncClient(timeout=60.0) as others:

            async def ask() -> list[int]:
                completion = await client.generate(
                    PROMPTS[0], max_new_tokens=40, temperature=1.0, vocab_size=VOCAB_SIZE, versions={0}, seed=3
                )
                return list(completion.token_ids)

            async def ask_with(**filters: float) -> None:
                sampling = {"max_new_tokens": 80, "ignore_eos": True, **filters}
                body = {"input_ids": PROMPTS[1], "sampling_params": sampling}
                (await others.post(f"{served}/generate", json=body)).raise_for_status()

            alone = await ask()
            filters: list[dict[str, float]] = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.0}]
            beside = [asyncio.ensure_future(ask_with(**each)) for each in filters]
            await asyncio.sleep(0.1)
            again = await ask()
            await asyncio.gather(*beside)
            return alone, again

    alone, again = asyncio.run(run())
    assert alone == again


def test_the_end_of_sequence_token_is_part_of_the_response(served: str, tiny_model_dir: Path) -> None:
    completions = sample(served, [1.5], repeats=8, max_new_tokens=80)
    stopped = [(p, c) for p, c in zip(PROMPTS * 8, completions, strict=True) if c.finish_reason == "stop"]
    assert stopped
    tokenizer = make_tokenizer()
    for prompt, completion in stopped:
        assert completion.token_ids[-1] == EOS
        assert EOS not in completion.token_ids[:-1]
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert difference(tiny_model_dir, prompt, completion, 1.5) < BOUND
    for completion in completions:
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == 80
            assert EOS not in completion.token_ids


def test_scores_are_untempered_log_probs_of_the_prompt(served: str, tiny_model_dir: Path) -> None:
    async def run() -> list[list[float]]:
        async with SGLangClient(served, deadline=60.0) as client:
            return [await client.score([*prompt, VOCAB_SIZE - 1, 3]) for prompt in PROMPTS for _ in range(2)]

    for prompt, scores in zip(np.repeat(np.array(PROMPTS, dtype=object), 2), asyncio.run(run()), strict=True):
        ids = [*prompt, VOCAB_SIZE - 1, 3]
        expected = reference(tiny_model_dir, ids)[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(expected - scores).max() < BOUND


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("top_k", [5, VOCAB_SIZE])
def test_the_most_likely_tokens_are_those_of_the_tempered_distribution(
    served: str, tiny_model_dir: Path, temperature: float, top_k: int
) -> None:
    async def run() -> list[Completion]:
        async with SGLangClient(served, deadline=60.0) as client:
            calls = [
                client.generate(
                    prompt,
                    max_new_tokens=20,
                    temperature=temperature,
                    vocab_size=VOCAB_SIZE,
                    versions={0},
                    top_k=top_k if number % 3 else 0,  # requests without likely tokens share the batch
                )
                for number, prompt in enumerate(PROMPTS)
            ]
            return await asyncio.gather(*calls)

    for number, (prompt, completion) in enumerate(zip(PROMPTS, asyncio.run(run()), strict=True)):
        if number % 3 == 0:
            assert completion.top_tokens is None
            continue
        assert completion.top_tokens is not None
        top = completion.top_tokens
        mu = reference(tiny_model_dir, prompt + list(completion.token_ids), temperature)[len(prompt) - 1 : -1]
        assert top.ids.shape == (len(completion.token_ids), top_k)
        assert np.abs(np.take_along_axis(mu, top.ids.astype(np.int64), 1) - top.logprobs).max() < BOUND
        assert np.abs(np.sort(mu, axis=1)[:, : -top_k - 1 : -1] - top.logprobs).max() < BOUND  # none is more likely
        if top_k == VOCAB_SIZE:
            np.testing.assert_allclose(np.exp(top.logprobs).sum(1), 1, atol=1e-5)
