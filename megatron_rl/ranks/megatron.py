"""Imports Megatron-Core; without a GPU in half the time.

While it is imported, Megatron-Core decorates functions with torch.compile, which loads torch's compiler, and imports
wandb for its inference server. The two take longer than all the rest. Without a GPU the functions stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return _as_it_is if function is None else function


@contextmanager
def _quickly() -> Iterator[None]:
    if torch.cuda.device_count():
        yield
        return
    compile_, hides_wandb = torch.compile, "wandb" not in sys.modules
    torch.compile = _as_it_is  # type: ignore[assignment]
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        torch.compile = compile_
        if hides_wandb:
            del sys.modules["wandb"]


if not torch.cuda.device_count():
    # SGLang's package for GPUs brings FlashMLA. Its import fails with OSError, and Megatron-Core expects ImportError.
    sys.modules.setdefault("flash_mla", None)  # type: ignore[arg-type]

with _quickly():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

__all__ = ["model_parallel_cuda_manual_seed", "parallel_state"]
