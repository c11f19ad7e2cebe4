"""Where a run waits for values of a tensor while Megatron-Core's schedule runs. On a GPU the host launches no kernels
until the device has computed these values."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_rl

OURS, MEGATRONS = Path(megatron_rl.__file__).parent, Path(megatron.core.__path__[0])
aten = torch.ops.aten
# The first is behind item(), int(tensor) and `if tensor`. The sizes of the others' results depend on values.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten.equal,
    aten._unique2,
    aten.repeat_interleave,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_}
NOT_ON_A_GPU = {"grouped_linear"}
"""In bf16 on a GPU it calls one grouped kernel."""


class HostWaits(TorchDispatchMode):
    """Collects the lines of megatron_rl that wait, as `file: line`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        by_mask = packet in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or (packet in WAITS and kwargs.get("output_size") is None):
            self.note()
        return func(*args, **kwargs)

    def note(self) -> None:
        """Adds the innermost line, unless it is Megatron-Core's."""
        for frame in reversed(traceback.extract_stack()):
            file = Path(frame.filename)
            if file.is_relative_to(OURS) and frame.name not in NOT_ON_A_GPU:
                self.lines.add(f"{file.name}: {frame.line}")
            if file.is_relative_to(OURS) or file.is_relative_to(MEGATRONS):
                return


@contextmanager
def noting(waits: HostWaits) -> Iterator[None]:
    """Notes what waits within the body; on a CPU torch dispatches nothing for tolist."""
    tolist = Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        waits.note()
        return tolist(tensor)

    with waits, mock.patch.object(Tensor, "tolist", noted):
        yield


def main(config_file: Path, overrides: str) -> list[str]:
    """Does a run; returns where it waited in its passes over micro-batches, forward and backward."""
    from train_worker import main as train

    from megatron_rl.engine import step

    waits, run = HostWaits(), step._run

    def noted(*args: Any, **kwargs: Any) -> Any:
        with noting(waits):
            return run(*args, **kwargs)

    with mock.patch.object(step, "_run", noted):
        train(config_file, [overrides])
    return sorted(waits.lines)
