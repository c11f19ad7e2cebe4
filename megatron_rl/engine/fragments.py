"""What a rank's optimizer holds of each weight, by the weight's name and place: a checkpoint of it fits any layout.

A rank has a shard of a weight (models/weight.py), and the distributed optimizer steps a stretch of it, flattened: the
fp32 weight and its moments. A checkpoint has these stretches under names that say of which shard of how many they are,
and nothing else of ranks. Under another layout they are put together to shards, cut anew, and cut into stretches again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.engine.shard_file import ShardReader
from megatron_rl.models.binding import ModelRanks, Slot
from megatron_rl.models.shards import reshard
from megatron_rl.models.weight import Weight

if TYPE_CHECKING:  # `megatron-rl export` reads checkpoints without it
    from megatron.core.optimizer import MegatronOptimizer

PARAM = "param"
"""The kind of tensor that is the fp32 weight; the other kinds are Adam's moments."""
COPIED = "embedding.word_embeddings.weight"
"""The weight that a last stage may have a copy of, which is stepped as the weight is."""


@dataclass(frozen=True, order=True)
class Stretch:
    """Positions [start, start + length) of shard `rank` of `size` of a weight, flattened."""

    weight: str
    rank: int
    size: int
    start: int
    length: int

    def named(self, network: str, kind: str) -> str:
        """Returns the name of a tensor of this stretch in a rank's file; `kind` is what the optimizer calls it."""
        return f"{network}/{kind}/{self.weight}/{self.rank}/{self.size}/{self.start}/{self.length}"

    @classmethod
    def parse(cls, name: str) -> tuple[str, Stretch]:
        """Returns the kind and the stretch of a name that `named` gave."""
        _, kind, weight, *place = name.split("/")
        rank, size, start, length = map(int, place)
        return kind, cls(weight, rank, size, start, length)


@dataclass(frozen=True)
class Held:
    """A stretch that this rank's optimizer has, and where: positions from `at` on of what it has of the parameter."""

    stretch: Stretch
    weight: Weight
    at: int


Read = Callable[[Stretch, int, int], Tensor]
"""(a saved stretch, first, length) -> these positions of it, 1-D."""


def held_by(part: MegatronOptimizer, slots: Sequence[Slot], ranks: ModelRanks) -> dict[torch.nn.Parameter, list[Held]]:
    """Returns what one of Megatron-Core's optimizers has of each parameter that it steps on this rank."""
    found: dict[torch.nn.Parameter, list[Held]] = defaultdict(list)
    for slot in slots:
        parameter = slot.parameter
        if not isinstance(parameter, torch.nn.Parameter) or parameter not in part.model_param_group_index_map:
            continue
        own = part._get_model_param_range_map(parameter)["param"]
        # Its values may have been moved away (engine/offload.py).
        extent = (parameter.shape if slot.index is None else parameter.shape[1:]).numel()
        first = (slot.index or 0) * extent
        begin, end = max(own.start, first), min(own.end, first + extent)
        if begin < end:
            name = COPIED if slot.weight.copy else slot.weight.name
            rank, size = ranks.share(slot.weight) if slot.weight.sharding.split else (0, 1)
            stretch = Stretch(name, rank, size, begin - first, end - begin)
            found[parameter].append(Held(stretch, slot.weight, begin - own.start))
    return found


class Saved:
    """The stretches of one kind of tensor in a checkpoint, from which those of any layout are made."""

    def __init__(self, stretches: Iterator[Stretch], read: Read) -> None:
        self._by_weight: dict[str, list[Stretch]] = defaultdict(list)
        for stretch in sorted(set(stretches)):
            self._by_weight[stretch.weight].append(stretch)
        self._read = read

    def values(self, held: Held) -> Tensor:
        """Returns the stretch, 1-D. Raises KeyError if the checkpoint has not all of it."""
        wanted = held.stretch
        sizes = {stretch.size for stretch in self._by_weight[wanted.weight]}
        if wanted.size in sizes:
            return self._shard(wanted.weight, wanted.rank, wanted.size, wanted.start, wanted.length)
        shard = reshard(held.weight, self.shards(held.weight, wanted.weight), wanted.rank, wanted.size)
        return shard.reshape(-1)[wanted.start : wanted.start + wanted.length]

    def shards(self, weight: Weight, name: str) -> list[Tensor]:
        """Returns all shards of a weight, which has this name in the checkpoint, as they were cut when it was written.
        Raises KeyError if the checkpoint has not all of them."""
        size = min((stretch.size for stretch in self._by_weight[name]), default=0)
        if not size:
            raise KeyError(name)
        shapes = [weight.cut(rank, size)[0] for rank in range(size)]
        return [self._shard(name, n, size, 0, math.prod(shape)).view(shape) for n, shape in enumerate(shapes)]

    def _shard(self, weight: str, rank: int, size: int, start: int, length: int) -> Tensor:
        """Returns positions [start, start + length) of a saved shard."""
        parts, position, end = [], start, start + length
        for stretch in self._by_weight[weight]:  # in order of their starts
            if (stretch.rank, stretch.size) != (rank, size) or stretch.start + stretch.length <= position:
                continue
            if stretch.start > position or position >= end:
                break
            first = position - stretch.start
            count = min(stretch.length - first, end - position)
            parts.append(self._read(stretch, first, count))
            position += count
        if position < end:
            raise KeyError(Stretch(weight, rank, size, start, length))
        return torch.cat(parts)


def read_saved(readers: Sequence[ShardReader], network: str) -> dict[str, Saved]:
    """Returns what the files of `readers` have of a network, by kind; of several files with a stretch the first is
    read."""
    where: dict[tuple[str, Stretch], ShardReader] = {}
    for reader in readers:
        for name in reader.names:
            if name.startswith(f"{network}/"):
                where.setdefault(Stretch.parse(name), reader)

    def saved(kind: str) -> Saved:
        def read(stretch: Stretch, first: int, length: int) -> Tensor:
            return where[kind, stretch].stretch(stretch.named(network, kind), first, length)

        return Saved((stretch for each, stretch in where if each == kind), read)

    return {kind: saved(kind) for kind in sorted({kind for kind, _ in where})}
