"""Computes attention over SGLang's KV cache for many short sequences at once, on a CPU.

SGLang's `torch_native` backend attends one sequence after another. With hundreds of requests of a small model this loop
takes most of a decoding step. Here sequences are padded to the longest and attended together, by the same PyTorch
function. What all layers of a forward pass share is computed once. Decoding steps use copies of the cache, if these are
not too large (sglang_cpu_decode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_rl.rollout.sglang_cpu_decode import Copies

MAX_SCORES = 1 << 22  # per call and head, padding included; bounds the memory


@dataclass(frozen=True)
class Together:
    """Sequences that attend together."""

    tokens: slice
    """Their new tokens among all."""
    rows: Tensor
    """Place of each new token in [sequences * longest query]."""
    slots: Tensor
    """Slots of their keys in the cache, [sequences * longest], int64: index_select is many times slower with int32."""
    seen: Tensor
    """Which keys each query sees: [sequences, longest query, longest]."""


def begin_forward(backend: Any, forward_batch: Any) -> None:
    """Forgets what the last forward pass shared. Called before TorchNativeAttnBackend.init_forward_metadata."""
    backend.parts = backend.step = None
    if not hasattr(backend, "copies"):
        backend.copies = Copies()
    if not forward_batch.forward_mode.is_decode():
        backend.copies.forget(forward_batch.req_pool_indices.tolist())


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
    if backend.parts is None:
        backend.parts = list(_parts(req_to_token, req_pool_indices, seq_lens, extend_seq_lens, len(k_cache)))
    _attend(backend.parts, query, output, k_cache, v_cache, options["scaling"])
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
    if backend.step is None and backend.parts is None:
        backend.step = backend.copies.step(req_to_token, req_pool_indices, seq_lens, len(k_cache))
    if backend.step is not None:
        backend.copies.attend(backend.step, query, output, k_cache, v_cache, options["scaling"])
        return output
    if backend.parts is None:
        ones = torch.ones_like(seq_lens)
        backend.parts = list(_parts(req_to_token, req_pool_indices, seq_lens, ones, len(k_cache)))
    _attend(backend.parts, query, output, k_cache, v_cache, options["scaling"])
    return output


def _attend(
    parts: list[Together], query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float | None
) -> None:
    """Attends all sequences and writes into `output`.

    `query` and `output` are (new tokens, heads, head_dim), sequence after sequence; the caches are (slots, KV heads,
    head_dim).
    """
    for part in parts:
        sequences, longest_q, longest_kv = part.seen.shape
        padded = query.new_zeros(sequences * longest_q, *query.shape[1:])
        padded.index_copy_(0, part.rows, query[part.tokens])
        keys, values = (
            cache.index_select(0, part.slots).view(sequences, longest_kv, *cache.shape[1:]).to(query.dtype)
            for cache in (k_cache, v_cache)
        )
        attended = scaled_dot_product_attention(
            padded.view(sequences, longest_q, *query.shape[1:]).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=part.seen[:, None],
            scale=scaling,
            enable_gqa=True,
        )
        output[part.tokens] = attended.transpose(1, 2).reshape_as(padded).index_select(0, part.rows)


def _parts(req_to_token: Tensor, rows: Tensor, kv_lens: Tensor, q_lens: Tensor, slots: int) -> Iterator[Together]:
    """`req_to_token[rows[i], :kv_lens[i]]` are the slots of sequence i, of a cache of `slots`; its last `q_lens[i]`
    tokens are new."""
    first = 0
    for some in _runs(q_lens.tolist(), kv_lens.tolist()):
        q_len, kv_len = q_lens[some], kv_lens[some]
        q_at, kv_at = torch.arange(int(q_len.max())), torch.arange(int(kv_len.max()))
        last = first + int(q_len.sum())
        there = q_at < q_len[:, None]  # (sequences, longest query)
        # A position beyond the end of a sequence has a slot of another sequence; the mask excludes it.
        at = req_to_token[rows[some], : len(kv_at)].clamp(0, slots - 1).long()
        seen = kv_at <= ((kv_len - q_len)[:, None] + q_at)[:, :, None]
        yield Together(slice(first, last), there.view(-1).nonzero().view(-1), at.view(-1), seen)
        first = last


def _runs(q_lens: list[int], kv_lens: list[int]) -> Iterator[slice]:
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
