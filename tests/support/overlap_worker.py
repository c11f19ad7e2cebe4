"""Rank 0 broadcasts buckets; rank 1 receives them as a server on a CPU does, and loads slowly."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.rollout import sglang_cpu_weights

BUCKETS = 3
SIZE = 8 << 20
Weights = list[tuple[str, Tensor]]


class Bucket:
    """Stands in for SGLang's FlattenedTensorBucket, which cannot be imported without SGLang: one tensor of fp32."""

    def __init__(self, *, flattened_tensor: Any = None, metadata: list[Any]) -> None:
        self._flat, self._metadata = flattened_tensor, metadata

    @classmethod
    def empty(cls, names: list[str], *_: object) -> Bucket:
        return cls(metadata=[SimpleNamespace(name=names[0], end_idx=4 * SIZE)])

    def get_metadata(self) -> list[Any]:
        return self._metadata

    def reconstruct_tensors(self) -> Weights:
        return [(self._metadata[0].name, self._flat.view(torch.float32))]


def send() -> None:
    for number in range(BUCKETS):
        dist.broadcast(torch.full((SIZE,), float(number)).view(torch.uint8), src=0)
        dist.distributed_c10d._get_default_store().set(f"sent {number}", "yes")


def receive(load: Callable[[object, Weights], tuple[bool, str]]) -> None:
    """Asks for all buckets, one after the other, and lets SGLang load each by `load`."""
    sys.modules["sglang.srt.weight_sync.tensor_bucket"] = SimpleNamespace(FlattenedTensorBucket=Bucket)  # type: ignore[assignment]
    updater = SimpleNamespace(_model_update_group={"group": dist.group.WORLD})
    for number in range(BUCKETS):
        weights = sglang_cpu_weights.receive(updater, names=[str(number)], dtypes=[], shapes=[], group_name="group")
        assert sglang_cpu_weights.load_later(load, updater, weights)[0]


def loads_while_the_next_arrives() -> list[tuple[str, float]]:
    """Returns the name and value of each bucket in the order in which rank 1 loaded them."""
    loaded: list[tuple[str, float]] = []

    def load(_: object, weights: Weights) -> tuple[bool, str]:
        following = min(len(loaded) + 1, BUCKETS - 1)
        store = dist.distributed_c10d._get_default_store()
        store.wait([f"sent {following}"], datetime.timedelta(seconds=20))
        loaded.extend((name, float(tensor[-1])) for name, tensor in weights)
        return True, ""

    if dist.get_rank() == 0:
        send()
        return []
    receive(load)
    assert len(loaded) == BUCKETS - 1
    sglang_cpu_weights.load_waiting()
    sglang_cpu_weights.load_waiting()  # there is none any more
    return loaded


def refuses_the_first() -> str:
    """Returns the error of the call for the second bucket, which has arrived all the same."""
    if dist.get_rank() == 0:
        dist.broadcast(torch.zeros(4 * SIZE, dtype=torch.uint8), src=0)
        dist.broadcast(torch.zeros(4 * SIZE, dtype=torch.uint8), src=0)
        return ""
    try:
        receive(lambda *_: (False, "a shape is wrong"))
    except RuntimeError as error:
        sglang_cpu_weights.load_waiting()  # nothing is left of it
        return str(error)
    return "no error"
