"""A host beside the CPU, for Megatron-Core's HybridDeviceOptimizer: it asks of each tensor whether it is on a GPU, and
moves some of them to the host. Here all tensors are on "the GPU" but those that it has moved. What it then computes is
its own code, and torch's AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def pretended_host() -> Iterator[None]:
    """Lets an optimizer be offloaded without a GPU. In the patched function alone tensors have other properties."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    import megatron_rl.engine.network as network

    shares = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def shared(self: Any, fraction: float) -> Any:
        with contextlib.ExitStack() as stack:
            for name, method in METHODS.items():
                stack.enter_context(mock.patch.object(torch.Tensor, name, method))
            return shares(self, fraction)

    with (
        mock.patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", shared),
        mock.patch.object(network, "check_machine"),  # it would miss the GPU
        # Under a build for CUDA AdamW would ask the driver whether a graph is captured.
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=None),
    ):
        yield


def _stays(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the method, whose result is on the host if its tensor is."""
    plain = getattr(torch.Tensor, name)

    def method(self: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = plain(self)
        result.on_host = _is_on_host(self)  # type: ignore[attr-defined]
        return result

    return method


def _moves(self: torch.Tensor) -> torch.Tensor:
    moved = torch.empty_like(self).copy_(self)
    moved.on_host = True  # type: ignore[attr-defined]
    return moved


def _is_on_host(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "on_host", False)


METHODS: dict[str, Any] = {
    "is_cuda": property(lambda self: not _is_on_host(self)),
    "cpu": _moves,
    "pin_memory": lambda self: self,
    **{name: _stays(name) for name in ("detach", "clone", "float")},
}
