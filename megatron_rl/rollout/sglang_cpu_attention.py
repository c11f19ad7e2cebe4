"""Computes attention over SGLang's KV cache for many short sequences at once, on a CPU.

SGLang's `torch_native` backend attends one sequence after another. With hundreds of requests of a small model this loop
takes most of a decoding step. Here sequences are padded to the longest and attended together, by the same PyTorch
function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MAX_SCORES = 1 << 22  # per call and head, padding included; bounds the memory


def extend(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_prefix_lens: Tensor,
    extend_seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Replaces TorchNativeAttnBackend._run_sdpa_forward_extend for causal attention; calls it in other cases.

    Each sequence's new tokens attend to the whole sequence. Writes into `output`, (tokens, heads, head_dim).
    """
    if encoder_lens is not None or not options["causal"] or options["sliding_window_size"] is not None:
        lengths = (seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens)
        return original(backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, *lengths, **options)
    caches = (k_cache, v_cache)
    _attend(query, output, caches, req_to_token, req_pool_indices, seq_lens, extend_seq_lens, options["scaling"])
    return output


def decode(
    original: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Replaces TorchNativeAttnBackend._run_sdpa_forward_decode: one new token per sequence."""
    if encoder_lens is not None or options["sliding_window_size"] is not None:
        tables = (req_to_token, req_pool_indices, seq_lens, encoder_lens)
        return original(backend, query, output, k_cache, v_cache, *tables, **options)
    caches = (k_cache, v_cache)
    ones = torch.ones_like(seq_lens)
    _attend(query, output, caches, req_to_token, req_pool_indices, seq_lens, ones, options["scaling"])
    return output


def _attend(
    query: Tensor,
    output: Tensor,
    caches: tuple[Tensor, Tensor],
    req_to_token: Tensor,
    rows: Tensor,
    kv_lens: Tensor,
    q_lens: Tensor,
    scaling: float | None,
) -> None:
    """Attends all sequences and writes into `output`.

    `query` and `output` are (sum of q_lens, heads, head_dim), sequence after sequence. `caches` are keys and values,
    (slots, KV heads, head_dim). `req_to_token[rows[i], :kv_lens[i]]` are the slots of sequence i.
    """
    first = 0
    for part in _parts(q_lens.tolist(), kv_lens.tolist()):
        q_len, kv_len = q_lens[part], kv_lens[part]
        q_at, kv_at = torch.arange(int(q_len.max())), torch.arange(int(kv_len.max()))
        there = q_at < q_len[:, None]  # (sequences, longest query)
        last = first + int(q_len.sum())
        padded = query.new_zeros(*there.shape, *query.shape[1:])
        padded[there] = query[first:last]
        # A position beyond the end of a sequence has a slot of another sequence; the mask excludes it.
        slots = req_to_token[rows[part], : len(kv_at)].clamp(0, len(caches[0]) - 1)
        keys, values = (cache[slots].transpose(1, 2).to(query.dtype) for cache in caches)
        seen = kv_at <= ((kv_len - q_len)[:, None] + q_at)[:, :, None]
        attended = scaled_dot_product_attention(
            padded.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
        )
        output[first:last] = attended.transpose(1, 2)[there]
        first = last


def _parts(q_lens: list[int], kv_lens: list[int]) -> Iterator[slice]:
    """Runs of consecutive sequences, at least one each, whose padded scores stay within MAX_SCORES."""
    start = longest_q = longest_kv = 0
    for i, (q, kv) in enumerate(zip(q_lens, kv_lens, strict=True)):
        wider_q, wider_kv = max(longest_q, q), max(longest_kv, kv)
        if i > start and (i + 1 - start) * wider_q * wider_kv > MAX_SCORES:
            yield slice(start, i)
            start, wider_q, wider_kv = i, q, kv
        longest_q, longest_kv = wider_q, wider_kv
    if q_lens:
        yield slice(start, len(q_lens))
