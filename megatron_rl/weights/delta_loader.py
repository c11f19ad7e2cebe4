"""Writes changed elements of weights into a running SGLang server: `--custom-weight-loader` names `load_delta`.

Runs inside of the server's processes, where the trainer's packages may be missing. The model's own `load_weights` finds
each tensor's place: it cuts, joins and turns tensors, and at last copies them into parameters. Here each tensor carries
a mask through all of that, and the copy takes masked elements alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from megatron_rl.weights.delta_file import read_blocks

_aten = torch.ops.aten
# They move elements and change none, so they do to a mask what they do to its values.
_MOVES = {
    _aten._to_copy,
    _aten._unsafe_view,
    _aten.alias,
    _aten.cat,
    _aten.clone,
    _aten.detach,
    _aten.expand,
    _aten.lift_fresh,
    _aten.permute,
    _aten.select,
    _aten.slice,
    _aten.split,
    _aten.split_with_sizes,
    _aten.squeeze,
    _aten.stack,
    _aten.t,
    _aten.transpose,
    _aten.unbind,
    _aten.unsqueeze,
    _aten.view,
}


def load_delta(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """The name of the only tensor is the path of the file."""
    ((path, _),) = named_tensors
    device = next(model.parameters()).device
    model.load_weights(_tensors(Path(path), device))  # type: ignore[operator]


def _tensors(path: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for block in read_blocks(path):
        indices = block.indices.to(device)
        values = torch.zeros(block.shape, dtype=block.values.dtype, device=device)
        mask = torch.zeros(block.shape, dtype=torch.bool, device=device)
        values.view(-1)[indices] = block.values.to(device)
        mask.view(-1)[indices] = True
        yield block.name, MaskedTensor(values, mask)


class MaskedTensor(Tensor):
    """Values of which only some count. Copied into a tensor, it leaves the elements that are not masked."""

    all_values: Tensor
    mask: Tensor
    """Any dtype; 0 where the value does not count."""

    @staticmethod
    def __new__(cls, values: Tensor, mask: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
        made.all_values, made.mask = values, mask
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # type: ignore[override]
        if func.overloadpacket is _aten.copy_:
            return _copy(*args[:2])
        if func.overloadpacket not in _MOVES:
            raise NotImplementedError(
                f"weights.route delta: this model's loading calls {func}, which may change weights; set another route"
            )
        values, masks = (
            func(*pytree.tree_map_only(cls, part, args), **kwargs)
            for part in (lambda each: each.all_values, lambda each: each.mask)
        )
        if isinstance(values, Tensor):
            return cls(values, masks)
        return [cls(*pair) for pair in zip(values, masks, strict=True)]


def _copy(target: Tensor, source: Tensor) -> Tensor:
    if isinstance(target, MaskedTensor):
        raise NotImplementedError("weights.route delta: this model's loading writes into tensors of the file")
    assert isinstance(source, MaskedTensor)
    values = source.all_values.to(target.device, target.dtype)
    return target.copy_(torch.where(source.mask.to(target.device) != 0, values, target))
