"""Attention of many sequences at once equals attention one by one. test_rollout_logprobs.py tests the real server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_rl.rollout import sglang_cpu_attention as attention

HEADS, KV_HEADS, HEAD_DIM, SCALING = 4, 2, 8, 0.3
OPTIONS: dict[str, Any] = {"scaling": SCALING, "causal": True, "sliding_window_size": None}


def unexpected(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("fell back to SGLang's own function")


def forward_pass(requests: Tensor, *, decodes: bool = False) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: decodes), req_pool_indices=requests)


def backend() -> SimpleNamespace:
    """An attention backend at the start of a forward pass."""
    made = SimpleNamespace(parts="of the forward pass before")
    attention.begin_forward(made, forward_pass(torch.empty(0)))
    return made


def problem(q_lens: list[int], kv_lens: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns (query, output, k_cache, v_cache, req_to_token, rows, kv_lens, prefixes, q_lens) and the expected output.

    Cache slots are in random order.
    """
    g = torch.Generator().manual_seed(0)
    n, slots, longest = len(q_lens), sum(kv_lens) + 5, max(kv_lens) + 3
    query = torch.randn(sum(q_lens), HEADS, HEAD_DIM, generator=g)
    keys, values = (torch.randn(slots, KV_HEADS, HEAD_DIM, generator=g) for _ in range(2))
    rows = torch.randperm(n + 2, generator=g)[:n]
    req_to_token = torch.full((n + 2, longest), 10**6)  # values beyond a sequence's end may be anything
    free, expected, first = torch.randperm(slots, generator=g), [], 0
    for row, q_len, kv_len in zip(rows.tolist(), q_lens, kv_lens, strict=True):
        at, free = free[:kv_len], free[kv_len:]
        req_to_token[row, :kv_len] = at
        q = query[first : first + q_len].transpose(0, 1)
        k, v = (cache[at].repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for cache in (keys, values))
        seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        expected.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALING).transpose(0, 1))
        first += q_len
    lengths = torch.tensor(kv_lens), torch.tensor(kv_lens) - torch.tensor(q_lens), torch.tensor(q_lens)
    output = torch.full_like(query, torch.nan)
    return (query, output, keys, values, req_to_token, rows, *lengths), torch.cat(expected)


@pytest.mark.parametrize("max_scores", [1, 60, 1 << 22])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([3], [3]), ([1, 5, 2, 4], [1, 9, 2, 11]), ([7, 1, 1], [7, 30, 8])])
def test_new_tokens_attend_only_to_their_own_sequence(
    monkeypatch: pytest.MonkeyPatch, max_scores: int, q_lens: list[int], kv_lens: list[int]
) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    arguments, expected = problem(q_lens, kv_lens)
    torch.testing.assert_close(attention.extend(unexpected, backend(), *arguments, **OPTIONS), expected)


@pytest.mark.parametrize("max_scores", [1, 20, 1 << 22])
def test_decode_attends_with_one_new_token_per_sequence(monkeypatch: pytest.MonkeyPatch, max_scores: int) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    arguments, expected = problem([1] * 5, [4, 1, 12, 7, 2])
    torch.testing.assert_close(attention.decode(unexpected, backend(), *arguments[:7], **OPTIONS), expected)


def test_layers_of_a_forward_pass_share_its_parts_and_the_next_pass_makes_new_ones() -> None:
    layers = backend()
    for q_lens, kv_lens in (([2, 3], [2, 5]), ([1, 1], [3, 6])):
        attention.begin_forward(layers, forward_pass(torch.empty(0)))
        arguments, expected = problem(q_lens, kv_lens)
        attention.extend(unexpected, layers, *arguments, **OPTIONS)
        of_first_layer = layers.parts
        query, output, keys, values, *tables = arguments
        more = attention.extend(unexpected, layers, query, output, keys, 2 * values, *tables, **OPTIONS)
        assert layers.parts is of_first_layer
        torch.testing.assert_close(more, 2 * expected)


def test_decoding_steps_use_copies_until_the_requests_take_part_in_another_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_rl.rollout.sglang_cpu_decode.ROOM", 4)
    layers = backend()
    entered: list[int] = []
    for kv_lens in ([4, 5], [5, 6], [6, 7]):
        (query, output, keys, values, table, rows, lengths, *_), expected = problem([1, 1], kv_lens)
        requests = torch.arange(2)
        spare = torch.zeros(40, KV_HEADS, HEAD_DIM)  # the cache has room for the copies
        caches = torch.cat((keys, spare)), torch.cat((values, spare))
        if len(entered) == 2:
            attention.begin_forward(layers, forward_pass(requests[:1]))
        attention.begin_forward(layers, forward_pass(requests, decodes=True))
        given = query, output, *caches, table[rows], requests, lengths
        found = attention.decode(unexpected, layers, *given, **OPTIONS)
        entered.append(len(layers.step.entered))
        if entered == [2]:  # afterwards the problem's earlier tokens are others than those copied
            torch.testing.assert_close(found, expected)
    assert entered == [2, 0, 1]


@pytest.mark.parametrize("change", [{"causal": False}, {"sliding_window_size": 4}])
def test_unsupported_options_are_left_to_sglang(change: dict[str, object]) -> None:
    arguments, _ = problem([1], [4])
    calls: list[dict[str, object]] = []

    def original(backend: None, *rest: Tensor, **options: object) -> Tensor:
        calls.append(options)
        assert len(rest) == 10
        return rest[1]

    attention.extend(original, None, *arguments, **OPTIONS | change)
    assert calls == [OPTIONS | change]
    with pytest.raises(AssertionError, match="fell back"):
        attention.decode(unexpected, None, *arguments[:7], torch.ones(1), **OPTIONS)  # type: ignore[call-arg]
