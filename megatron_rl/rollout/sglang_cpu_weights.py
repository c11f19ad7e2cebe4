"""Loads a bucket of weights on a CPU while the next one arrives.

SGLang receives a bucket and loads it before it answers, so the network waits for the loader, and on a CPU both cost
about as much. Here a bucket is loaded once the next one is asked for, while gloo's threads receive that one. The last
bucket is loaded when the session ends. A bucket that cannot be loaded fails the call after its own. That of a trainer
which was killed is dropped when the next trainer abandons its session.

Buckets arrive in two rooms in turn, which are kept: new memory for each would cost as much as its loading. They are
outside of malloc's heap, which would keep a room that was too small (megatron_rl/heap.py). SGLang's loaders copy what
they are given, but for fp8 and GGUF, which are not sent.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.rollout.sglang_launch import ABANDONED

_rooms = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
"""That of the last bucket is the second."""
_waiting: list[Callable[[], tuple[bool, str]]] = []
"""Loads the last bucket: one call for each model runner, as those of a draft model."""


def receive(
    updater: Any, *, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], group_name: str
) -> list[tuple[str, Tensor]]:
    """Replaces WeightUpdater._receive_bucketed_weights_from_distributed. Raises RuntimeError as `load_waiting`."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    metadata = FlattenedTensorBucket.empty(names, dtypes, shapes, "meta").get_metadata()
    flat = _free_room(metadata[-1].end_idx)
    arriving = dist.broadcast(flat, src=0, group=updater._model_update_group[group_name], async_op=True)
    _rooms.reverse()
    try:
        load_waiting()
    finally:
        arriving.wait()
    return FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata).reconstruct_tensors()


def _free_room(size: int) -> Tensor:
    """Returns [size] uint8, which the last bucket does not use."""
    if len(_rooms[0]) < size:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _rooms[0] = torch.frombuffer(mapped, dtype=torch.uint8)
    return _rooms[0][:size]


def load_later(
    original: Callable[..., tuple[bool, str]], updater: Any, named_tensors: list[tuple[str, Tensor]]
) -> tuple[bool, str]:
    """Puts off WeightUpdater.load_weights_from_distributed."""
    _waiting.append(partial(original, updater, named_tensors))
    return True, "Received."


def load_waiting() -> None:
    """Loads the last bucket if that has not been done. Raises RuntimeError if it cannot be loaded."""
    loads = list(_waiting)
    _waiting.clear()
    for load in loads:
        success, message = load()
        if not success:
            raise RuntimeError(message)


def end(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """Loads the last bucket in the scheduler's end_weight_update, whose answer says so if it cannot be loaded."""
    if request.rid == ABANDONED:
        _waiting.clear()
    try:
        load_waiting()
    except RuntimeError as error:
        ended = original(updater, request)
        ended.success, ended.message = False, str(error)
        return ended
    return original(updater, request)
