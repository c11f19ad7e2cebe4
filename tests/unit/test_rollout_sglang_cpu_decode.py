"""Decoding over copies of the KV cache equals attention over the cache, whatever requests come and go."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_rl.rollout import sglang_cpu_decode as decode

HEADS, KV_HEADS, WIDTH, VALUES, LAYERS, SCALE = 4, 2, 8, 6, 2, 0.3
REQUESTS, SLOTS, MOST = 12, 2048, 20


class Pool:
    """SGLang's cache with requests in it: their numbers, slots and tokens. Slots without a token hold large numbers."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.table = torch.full((REQUESTS, 400), 10**6, dtype=torch.int32)
        self.keys, self.values = (
            [torch.full((SLOTS, KV_HEADS, width), 1e4, dtype=dtype) for _ in range(LAYERS)] for width in (WIDTH, VALUES)
        )
        self.free = list(range(SLOTS))
        self.lengths: dict[int, int] = {}

    def add(self, request: int, tokens: int) -> None:
        """Puts new tokens of a request into the cache."""
        self.random.shuffle(self.free)
        start = self.lengths.get(request, 0)
        slots = torch.tensor([self.free.pop() for _ in range(tokens)])
        self.table[request, start : start + tokens] = slots.int()
        for cache in (*self.keys, *self.values):
            cache[slots] = torch.randn(tokens, *cache.shape[1:], generator=self.generator).to(cache)
        self.lengths[request] = start + tokens

    def end(self, request: int) -> None:
        length = self.lengths.pop(request)
        slots = self.table[request, :length].tolist()
        self.free += slots
        for cache in (*self.keys, *self.values):
            cache[slots] = 1e4
        self.table[request, :length] = 10**6

    def expected(self, layer: int, request: int, query: Tensor) -> Tensor:
        """query [heads, D] of a request's last token -> [heads, width of values]."""
        slots = self.table[request, : self.lengths[request]].long()
        keys, values = (
            cache[layer][slots].float().repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1)
            for cache in (self.keys, self.values)
        )
        return scaled_dot_product_attention(query.float()[:, None], keys, values, scale=SCALE)[:, 0]


def check_step(pool: Pool, copies: decode.Copies, requests: list[int]) -> decode.Step:
    """Decodes a token of each request, and compares with attention over the cache."""
    for request in requests:
        pool.add(request, 1)
    lengths = torch.tensor([pool.lengths[request] for request in requests])
    step = copies.step(pool.table, torch.tensor(requests), lengths, SLOTS)
    assert step is not None
    for layer in range(LAYERS):
        dtype = pool.keys[layer].dtype
        query = torch.randn(len(requests), HEADS, WIDTH, generator=pool.generator).to(dtype)
        output = torch.full((len(requests), HEADS, VALUES), torch.nan, dtype=dtype)
        copies.attend(step, query, output, pool.keys[layer], pool.values[layer], SCALE)
        expected = torch.stack([pool.expected(layer, *pair) for pair in zip(requests, query, strict=True)])
        torch.testing.assert_close(output, expected.to(dtype))
    return step


def prefill(pool: Pool, copies: decode.Copies, request: int, tokens: int) -> None:
    pool.add(request, tokens)
    copies.forget([request])


@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ROOM", 5)
    pool, copies = Pool(seed), decode.Copies()
    chance = pool.random
    running: list[int] = []
    for _ in range(60):
        for request in [r for r in running if chance.random() < 0.1]:
            running.remove(request)
            pool.end(request)
        absent = [r for r in range(REQUESTS) if r not in running]
        for request in chance.sample(absent, min(len(absent), chance.choice([0, 0, 1, 3]))):
            prefill(pool, copies, request, chance.randint(1, MOST))
            running.insert(chance.randint(0, len(running)), request)
        decoded = running if chance.random() < 0.8 else chance.sample(running, len(running) // 2)
        if decoded:
            check_step(pool, copies, decoded)


def test_a_sequence_keeps_its_row_and_is_copied_once() -> None:
    pool, copies = Pool(0), decode.Copies()
    for request, tokens in ((3, 4), (1, 9), (7, 2)):
        prefill(pool, copies, request, tokens)
    assert len(check_step(pool, copies, [3, 1, 7]).entered) == 3
    step = check_step(pool, copies, [3, 1, 7])
    assert step.in_order
    assert not len(step.entered)
    step = check_step(pool, copies, [7, 3])
    assert (step.rows.tolist(), step.in_order, len(step.entered)) == ([2, 0], False, 0)
    prefill(pool, copies, 5, 6)
    step = check_step(pool, copies, [7, 5, 3])
    assert (step.rows.tolist(), step.entered.tolist()) == ([2, 1, 0], [1])


def test_a_number_that_another_request_has_now_is_not_the_old_one() -> None:
    """Both have the same number of tokens, so only the prompt's forward pass tells them apart."""
    pool, copies = Pool(0), decode.Copies()
    prefill(pool, copies, 3, 4)
    check_step(pool, copies, [3])
    pool.end(3)
    prefill(pool, copies, 3, 5)
    assert check_step(pool, copies, [3]).entered.tolist() == [0]


def test_a_request_that_grew_by_more_than_a_token_is_copied_again() -> None:
    pool, copies = Pool(0), decode.Copies()
    prefill(pool, copies, 3, 4)
    check_step(pool, copies, [3])
    pool.add(3, 2)
    assert check_step(pool, copies, [3]).entered.tolist() == [0]


def test_rows_of_sequences_that_ended_are_given_up() -> None:
    pool, copies = Pool(0), decode.Copies()
    for request in range(8):
        prefill(pool, copies, request, 3)
    check_step(pool, copies, list(range(8)))
    used = [len(check_step(pool, copies, list(range(8 - left, 8))).bias) for left in (7, 6, 4)]
    assert used == [8, 8, 4]


def test_copies_grow_with_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ROOM", 3)
    pool, copies = Pool(0), decode.Copies()
    prefill(pool, copies, 0, 4)
    prefill(pool, copies, 1, 1)
    assert [len(check_step(pool, copies, [0, 1]).entered) for _ in range(6)] == [2, 0, 0, 0, 2, 0]


def test_bf16_is_attended_in_fp32() -> None:
    pool, copies = Pool(0, torch.bfloat16), decode.Copies()
    prefill(pool, copies, 0, 7)
    check_step(pool, copies, [0])


def test_copies_larger_than_the_cache_are_not_made() -> None:
    pool, copies = Pool(0), decode.Copies()
    prefill(pool, copies, 0, 7)
    pool.add(0, 1)
    requests, lengths = torch.tensor([0]), torch.tensor([8])
    fits = 2 * (8 + decode.ROOM)
    assert copies.step(pool.table, requests, lengths, fits - 1) is None
    assert copies.step(pool.table, requests[:0], lengths[:0], fits) is None
    assert copies.step(pool.table, requests, lengths, fits) is not None
