"""A GPU beside the host, for Megatron-Core's calls that move memory (engine/offload.py): while one of them runs, every
tensor is on "the GPU" but the copies that it has made for the host. What is moved away is really freed or copied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

_ON_HOST: dict[int, torch.Tensor] = {}
"""Copies for the host, by the address of their memory; they stay alive, so that no other tensor gets it."""


@contextlib.contextmanager
def pretended_gpu(network: Any) -> Iterator[None]:
    device, network.device = network.device, torch.device("cuda")
    with contextlib.ExitStack() as stack:
        for name, method in METHODS.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        for name in ("synchronize", "empty_cache"):
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=None))
        try:
            yield
        finally:
            network.device = device


def moved(self: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(self).copy_(self)
    _ON_HOST[copy.untyped_storage().data_ptr()] = copy
    return copy


def moved_back(self: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(self).copy_(_ON_HOST.pop(self.untyped_storage().data_ptr()))


METHODS: dict[str, Any] = {
    "is_cuda": property(lambda self: self.untyped_storage().data_ptr() not in _ON_HOST),
    "cpu": moved,
    "cuda": moved_back,
    "pin_memory": lambda self: self,
}
