"""apex's kernel on a CPU: Megatron-Core's own code then adds weight gradients of linear layers to DDP's buffers."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

calls: list[tuple[int, ...]] = []
"""Shapes of the weights whose gradients were added."""


@contextlib.contextmanager
def pretended_apex() -> Iterator[None]:
    import megatron.core.tensor_parallel.layers as layers

    import megatron_rl.engine.network as network

    kernel = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add)
    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(network, "has_apex_kernel", return_value=True),
    ):
        yield


def _add(inputs: Tensor, output_gradient: Tensor, buffer: Tensor) -> None:
    calls.append(tuple(buffer.shape))
    buffer += output_gradient.t() @ inputs
