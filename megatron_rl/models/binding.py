"""Which parameter of this rank's stages holds which weight.

Megatron-Core numbers layers within a stage, and some layers name parameters otherwise, stack experts or number them
within a rank. All of that is undone here; what a layer's own names mean is told by WeightNames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.kinds import WeightKind
from megatron_rl.models.registry import weights_of
from megatron_rl.models.weight import Weight

WeightNames = Callable[[str, range], Iterable[tuple[str, int | None]]]
"""(a parameter's name within its layer, global numbers of the rank's experts) -> the weights that it holds: each one's
name within the layer, with its global expert number, and its row if the parameter stacks experts, else None."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModelRanks:
    """This rank's share of every layer."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1

    def share(self, weight: Weight) -> tuple[int, int]:
        """(rank, size) among the ranks over which the weight is cut."""
        return (self.tp_rank, self.tp_size) if weight.expert is None else (self.etp_rank, self.etp_size)


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one weight's shard on this rank: a parameter, or row `index` of a stacked one; or a buffer, if the
    weight does not train."""

    weight: Weight
    parameter: Tensor
    index: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The weight's part of a tensor shaped like the parameter (its data, its gradient)."""
        return tensor if self.index is None else tensor[self.index]


def bind(chunks: Sequence[nn.Module], arch: Architecture, ranks: ModelRanks, names: WeightNames) -> list[Slot]:
    """Returns a slot for each weight that this rank holds a shard of, in the order of the model's list.

    `chunks` are the rank's virtual stages, unwrapped; `names` are those of their layers. Raises ValueError for a
    parameter that holds no known weight or has another shape than the architecture and layout ask for, for a weight
    held twice, and for a weight of a held layer that no parameter holds.
    """
    weights = {weight.name: weight for weight in weights_of(arch)}
    if arch.num_experts % ranks.ep_size:
        raise ValueError(f"{arch.num_experts} experts do not divide over {ranks.ep_size} expert-parallel ranks")
    local_experts = arch.num_experts // ranks.ep_size
    experts = range(ranks.ep_rank * local_experts, (ranks.ep_rank + 1) * local_experts)
    slots: dict[str, Slot] = {}
    for chunk in chunks:
        for name, parameter in (*chunk.named_parameters(), *chunk.named_buffers()):
            for canonical, index in _canonical(chunk, name, experts, names):
                weight = weights.get(canonical)
                if not isinstance(parameter, nn.Parameter) and (weight is None or weight.trained):
                    continue  # what Megatron-Core counts with, or derives from the configuration
                if weight is None or (weight.expert is not None and weight.expert not in experts):
                    raise ValueError(f"parameter {name} ({canonical}) is no weight of this rank's {arch.model_type}")
                if canonical in slots:
                    raise ValueError(f"parameter {name}: {canonical} is held twice on this rank")
                slots[canonical] = Slot(weight, parameter, index)
                _check_shape(name, slots[canonical], ranks, local_experts)
    _check_complete(weights, slots, arch, experts)
    return [slots[name] for name in weights if name in slots]


def parameter_kinds(slots: Iterable[Slot]) -> dict[nn.Parameter, WeightKind]:
    """Returns the kind of the weights that each parameter holds. Raises ValueError for a parameter of two kinds."""
    kinds: dict[nn.Parameter, WeightKind] = {}
    for slot in slots:
        if not isinstance(slot.parameter, nn.Parameter):
            continue
        if kinds.setdefault(slot.parameter, slot.weight.kind) != slot.weight.kind:
            raise ValueError(f"{slot.weight.name} ({slot.weight.kind}): its parameter holds another kind of weight too")
    return kinds


def _check_shape(name: str, slot: Slot, ranks: ModelRanks, local_experts: int) -> None:
    shape, _ = slot.weight.cut(*ranks.share(slot.weight))
    expected = shape if slot.index is None else (local_experts, *shape)
    if tuple(slot.parameter.shape) != expected:
        raise ValueError(
            f"parameter {name} has shape {tuple(slot.parameter.shape)}; config.json and the layout ask for {expected}"
        )


def _check_complete(weights: dict[str, Weight], slots: dict[str, Slot], arch: Architecture, experts: range) -> None:
    """A weight of the files that the model lacks would be dropped in silence, as a norm left unconfigured."""
    held: set[int | str] = {slot.weight.at for slot in slots.values()}
    held |= {end for end, layer in (("first", 0), ("last", arch.num_layers - 1)) if layer in held}
    for name, weight in weights.items():
        elsewhere = weight.expert is not None and weight.expert not in experts
        if weight.at in held and not weight.copy and not elsewhere and name not in slots:
            raise ValueError(f"no parameter of this rank's stages holds {name} ({weight.sources[0].name})")


def _canonical(chunk: nn.Module, name: str, experts: range, names: WeightNames) -> Iterator[tuple[str, int | None]]:
    """Yields the global name or names of a stage's parameter, each with its row if experts are stacked."""
    in_layer = _LAYER.fullmatch(name)
    if in_layer is None:
        yield name, None
        return
    module: Any = chunk.get_submodule(f"decoder.layers.{in_layer[1]}")
    layer = f"decoder.layers.{module.layer_number - 1}"  # layer_number is global and counts from 1
    for rest, row in names(in_layer[2], experts):
        yield f"{layer}.{rest}", row
