"""How many parameters a rank holds, counted from the model's list of weights. No torch.

The list is the one that every weight is loaded by: `bind` refuses a parameter that is not in it, or has another shape.
It takes milliseconds a layout, so that many can be tried; pretended.py builds the model itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from megatron_rl.config.layout import Coordinates, Layout
from megatron_rl.config.schema import OptimConfig
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.kinds import WeightKind
from megatron_rl.models.registry import weights_of

FP32 = 4


@dataclass(frozen=True)
class NetworkBytes:
    """What one network's tensors take on a rank, from the first optimizer step on."""

    weights: int
    gradients: int = 0  # buffers in engine.grad_dtype
    optimizer: int = 0  # this rank's part of the fp32 weights, if the model's are bf16, and of Adam's two moments
    host: int = 0  # what of these is in the host's memory
    largest: int = 0  # largest parameter, whose gradient is made in the model's dtype before it is added to the buffer

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(item: int, optim: OptimConfig) -> tuple[float, float]:
    """Returns the bytes that the optimizer keeps for a weight of `item` bytes: on the GPU, and in the host's memory."""
    if optim.moments_dtype == "bf16":
        return 2 + 2 * 2, 0.0  # the 16 bits that a bf16 weight lacks, and the moments
    state = 2 * FP32 + (FP32 if item < FP32 else 0)
    return state * (1 - optim.offload), (state + FP32) * optim.offload  # the host has gradients too


Where = int | str
"""A layer's number, or `first` or `last`: the end of the pipeline that holds the weight."""
Counts = dict[Where, Counter[tuple[str, WeightKind, bool]]]


@functools.lru_cache(maxsize=8)
def _elements(arch: Architecture) -> Counts:
    """Returns elements of the whole model by place, by how ranks share them (expert, expert-whole, split, whole, copy),
    by kind, and by whether they train."""
    counts: Counts = {}
    for weight in weights_of(arch):
        shared = "expert" if weight.expert is not None else "split"
        if not weight.sharding.split:
            shared = "expert-whole" if weight.expert is not None else "whole"
        if weight.copy:  # of tied embeddings, where the last stage is not the first
            shared = "copy"
        key = shared, weight.kind, weight.trained
        counts.setdefault(weight.at, Counter())[key] += weight.elements()
    return counts


@functools.lru_cache(maxsize=8)
def largest_tensor(arch: Architecture) -> int:
    """Returns the elements of the largest tensor that an export gathers: a weight, or all experts that it stacks."""
    tensors: Counter[str] = Counter()
    for weight in weights_of(arch):
        tensors[weight.sources[0].name] += weight.elements()
    return max(tensors.values())


def held_places(arch: Architecture, layout: Layout, pp: int) -> list[Where]:
    """Returns the places of the weights that pipeline stage `pp` holds."""
    layers = [layer for virtual in layout.split(arch.num_layers)[pp :: layout.pp] for layer in virtual]
    ends: list[Where] = [*(["first"] if pp == 0 else []), *(["last"] if pp == layout.pp - 1 else [])]
    return [*ends, *layers]


def multiplied_elements(arch: Architecture, layout: Layout, at: Coordinates) -> int:
    """Returns how many elements of linear layers and experts the rank at `at` holds, with those of norms."""
    shares = _shares(layout)
    return round(
        sum(
            elements / shares[shared]
            for place in held_places(arch, layout, at.pp)
            for (shared, kind, _), elements in _elements(arch).get(place, Counter()).items()
            if kind in ("attention", "expert", "other")
        )
    )


def _shares(layout: Layout) -> dict[str, int]:
    """Returns over how many ranks a weight is cut, by how they share it."""
    shares = {"expert": layout.ep * layout.etp, "expert-whole": layout.ep, "split": layout.tp, "whole": 1}
    return {**shares, "copy": layout.tp}


def network_bytes(
    arch: Architecture,
    layout: Layout,
    at: Coordinates,
    item: int,
    *,
    gradient: int = FP32,
    optim: OptimConfig | None = None,
) -> NetworkBytes:
    """Returns what the rank at `at` holds of a network with `item` bytes a weight and `gradient` bytes a gradient.
    Without `optim` nothing trains."""
    shares = _shares(layout)
    replicas = {"expert": layout.edp, "expert-whole": layout.edp}
    weights = gradients = stepped = largest = 0.0
    for place in held_places(arch, layout, at.pp):
        stacked: Counter[str] = Counter()
        for (shared, kind, trained), elements in _elements(arch).get(place, Counter()).items():
            if shared == "copy" and layout.pp == 1:
                continue
            mine = elements / shares[shared]
            weights += mine * (item if trained else FP32)
            if optim is None or not trained or kind in optim.freeze:
                continue
            gradients += mine * gradient
            stepped += mine / replicas.get(shared, layout.dp * layout.cp)
            stacked[kind] += mine * item  # type: ignore[assignment]
        # Experts are stacked in two parameters: gate with up, and down.
        largest = max([largest, *(n * 2 / 3 if kind == "expert" else n for kind, n in stacked.items())])
    on_gpu, on_host = state_bytes(item, optim) if optim else (0.0, 0.0)
    return NetworkBytes(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(stepped * on_gpu),
        host=round(stepped * on_host),
        largest=round(largest),
    )
