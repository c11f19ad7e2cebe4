"""Chooses the device, and makes stock Megatron-Core run without a GPU.

Megatron-Core calls torch.cuda directly in many places. Where there is no CUDA device, `use_device("cpu")` puts a
stand-in behind each of those calls, process-wide and once. Each item below is one function that names what it stands
in for; tests/ranks/test_engine_device.py leaves out one item at a time and shows that training then fails, so that an
upgrade of Megatron-Core that makes an item unnecessary turns a test red. On a GPU only ON_EVERY_DEVICE is applied.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rl.heap import keep_freed_memory
from megatron_rl.ranks.known_warnings import ON_CPU, hide_known_warnings
from megatron_rl.ranks.own_device import resolve_device

CPU = torch.device("cpu")

NCCL_OF_SERVERS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang sets for NCCL if its environment does not. Rank 0 and the servers share a communicator for weights, whose
ranks may fail to connect if one allocates its buffers in another way. All ranks of a run share communicators with
rank 0, so all need the same. NCCL reads the variables once, before its first communicator."""


def use_device(requested: str, leave_out: Collection[str] = ()) -> torch.device:
    """Makes the device ready for Megatron-Core and returns it. Call it before anything of Megatron-Core.

    `leave_out` names items to omit; only the test that proves each one necessary uses it.
    """
    unknown = set(leave_out) - {*CPU_LAYER, *ON_EVERY_DEVICE}
    if unknown:
        raise ValueError(f"no such items: {sorted(unknown)}")
    device = resolve_device(requested)
    items = dict(ON_EVERY_DEVICE)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for setting, value in NCCL_OF_SERVERS.items():
            os.environ.setdefault(setting, value)
    elif not getattr(torch.cuda, "_megatron_rl_cpu_layer", False):
        items = CPU_LAYER | items
        torch.cuda._megatron_rl_cpu_layer = True  # type: ignore[attr-defined]
        hide_known_warnings(ON_CPU)
        keep_freed_memory()
    for name, item in items.items():
        if name not in leave_out:
            item()
    return device


def put(values: Tensor | npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Returns values on the device, without waiting for the work that a GPU still has before it.

    They must not change afterwards: on a CPU the tensor shares their memory.
    """
    tensor = torch.as_tensor(values)
    return tensor if tensor.device.type == device.type else tensor.pin_memory().to(device, non_blocking=True)


# ---- the CPU layer ---------------------------------------------------------------------------------------------


class _Stream:
    """Stands in for torch.cuda.Stream: work on a CPU is in order already."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def _current_device() -> None:
    """torch.cuda.current_device() names where Megatron-Core allocates (95 uses)."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def _streams() -> None:
    """Streams and events of the token dispatcher, the gradient reduction and the pipeline."""
    stream = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda device=None: stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None


def _random_state() -> None:
    """tensor_parallel.random keeps one CUDA generator state per region; here it is the CPU generator's."""
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _factories() -> None:
    """Calls such as torch.zeros(..., device="cuda") in schedules, gradient clipping and optimizers."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "cuda" in str(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)  # YaRN asks for it under context parallelism
            return factory(*args, **kwargs)

        return wrapped

    for name in ("tensor", "zeros", "ones", "empty"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _to_cuda() -> None:
    """.cuda() on tensors and modules (rotary embedding under context parallelism, tied embeddings, DDP)."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _tensor_types() -> None:
    """The optimizers compare Tensor.type() with torch.cuda.FloatTensor and its like."""
    plain = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]


def _all_to_all() -> None:
    """gloo's all_to_all_single takes split sizes only as lists of ints, and only contiguous input."""
    plain: Any = torch.distributed.all_to_all_single

    def all_to_all_single(
        output: Any,
        input: Any,
        output_splits: Any = None,
        input_splits: Any = None,
        group: Any = None,
        async_op: bool = False,
        **splits: Any,
    ) -> Any:
        output_splits = splits.get("output_split_sizes", output_splits)
        input_splits = splits.get("input_split_sizes", input_splits)
        as_ints = [None if s is None else [int(n) for n in s] for s in (output_splits, input_splits)]
        return plain(output, input.contiguous(), *as_ints, group=group, async_op=async_op)

    torch.distributed.all_to_all_single = all_to_all_single  # type: ignore[assignment]


def _uneven_collectives() -> None:
    """The dispatcher gathers and reduces uneven parts over expert-tensor ranks; gloo's collectives are even."""
    even_gather, even_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def all_gather(outputs: Any, input: Any, group: Any = None, async_op: bool = False) -> Any:
        if all(o.shape == input.shape for o in outputs):
            return even_gather(outputs, input, group=group, async_op=async_op)
        for index, output in enumerate(outputs):
            if index == torch.distributed.get_rank(group):
                output.copy_(input)
            torch.distributed.broadcast(output, group=group, group_src=index)
        return None

    def reduce_scatter(
        output: Any,
        inputs: Any,
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(i.shape == output.shape for i in inputs):
            return even_scatter(output, inputs, op=op, group=group, async_op=async_op)
        for index, part in enumerate(inputs):
            part = part.clone()
            torch.distributed.reduce(part, op=op, group=group, group_dst=index)
            if index == torch.distributed.get_rank(group):
                output.copy_(part)
        return None

    torch.distributed.all_gather = all_gather  # type: ignore[assignment]
    torch.distributed.reduce_scatter = reduce_scatter  # type: ignore[assignment]


def _router_gemm() -> None:
    """megatron-core 0.16.1 reads te_general_gemm without defining it when Transformer Engine is absent."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _latent_attention() -> None:
    """megatron-core 0.16.1 takes Transformer Engine for there if its own extensions can be imported."""
    import megatron.core.transformer.multi_latent_attention as latent

    if not isinstance(latent.TELinear, type):
        latent.HAVE_TE = False


def _norm_recomputation() -> None:
    """Recomputation of norms takes `fp8=False` for fp8, and then asks Transformer Engine, if it is there or not."""
    import megatron.core.tensor_parallel.random as random

    if not random.HAVE_TE:
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = lambda **_: contextlib.nullcontext()
        random.fp8_autocast = lambda **_: contextlib.nullcontext()


CPU_LAYER: dict[str, Callable[[], None]] = {
    "current_device": _current_device,
    "streams": _streams,
    "random_state": _random_state,
    "factories": _factories,
    "to_cuda": _to_cuda,
    "tensor_types": _tensor_types,
    "all_to_all": _all_to_all,
    "uneven_collectives": _uneven_collectives,
}

# Needed on a GPU too, and applied more than once without harm.
ON_EVERY_DEVICE: dict[str, Callable[[], None]] = {
    "router_gemm": _router_gemm,
    "latent_attention": _latent_attention,
    "norm_recomputation": _norm_recomputation,
}
