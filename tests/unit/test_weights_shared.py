"""Which server gets which rank's memory, and what SGLang reads of it. A stand-in notes what the servers are asked."""

from __future__ import annotations

import contextlib
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import get_sharing_strategy

from megatron_rl.weights import shared
from megatron_rl.weights.collective import as_bytes
from megatron_rl.weights.shared import SharedRoute, describe, payload


def test_each_server_reads_the_memory_of_the_ranks_whose_gpus_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs every rank's copy would do."""
    asked: list[Any] = []
    servers: Any = SimpleNamespace(
        urls=["c", "a"], start_each=lambda call, each: asked.append((call, each)), wait=lambda _: None
    )
    monkeypatch.setattr(shared, "together", lambda _: contextlib.nullcontext())  # there are no other ranks
    route = SharedRoute(servers, ["a", "b", "c"], SimpleNamespace(control=None), torch.device("cpu"))  # type: ignore[arg-type]
    route._load([b"0", b"1", b"2", b"3", b"4", b"5"], [2, 2])  # one was left out
    assert asked == [("update_weights_from_tensor", [{"payloads": [b"4", b"5"]}, {"payloads": [b"0", b"1"]}])]


def test_a_payload_holds_the_tensors_of_its_bucket() -> None:
    bucket = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.arange(4, dtype=torch.float32))]
    before = get_sharing_strategy()
    flat = as_bytes(bucket)
    read = pickle.loads(payload(flat, describe(bucket)))
    for (name, tensor), meta in zip(bucket, read["metadata"], strict=True):
        assert (name, tensor.shape, tensor.dtype, tensor.nbytes) == (meta.name, meta.shape, meta.dtype, meta.numel)
        part = read["flattened_tensor"][meta.start_idx : meta.end_idx]
        assert tensor.equal(part.view(meta.dtype).reshape(meta.shape))
    flat.zero_()
    assert not read["flattened_tensor"].any(), "the memory is not the same"
    assert get_sharing_strategy() == before
