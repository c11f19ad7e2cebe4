"""Layouts: how a world of ranks divides into tensor, pipeline, context, expert and data parallelism. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.config.engine import check_engine
from megatron_rl.config.schema import EngineConfig, ParallelConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture

DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp")
MAX_SIZES = 12
"""Sizes that a message lists before it leaves some out."""


class LayoutError(UserError):
    """Degrees of parallelism that do not fit together, the world or the model."""


@dataclass(frozen=True)
class Coordinates:
    """One rank's numbers in the attention grid (tp, cp, dp, pp) and in the expert grid (etp, ep, edp, pp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int

    @property
    def leads_replica(self) -> bool:
        """Whether this rank talks to the rollout servers for its data-parallel replica."""
        return self.tp == self.cp == self.pp == 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the two grids of ranks, and Megatron-Core's default order in them: attention tp, cp, dp, pp, with tp
    fastest, and world = tp * cp * dp * pp; experts etp, ep, edp, pp, and world = etp * ep * edp * pp."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    edp: int
    world_size: int
    stage_layers: tuple[int, ...] | None = None
    token_multiple: int = 1
    """What each rank's tokens of a micro-batch divide by (engine.fp8)."""

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """Raises LayoutError when the degrees do not divide the world."""
        dense = parallel.tp * parallel.cp * parallel.pp
        expert = parallel.etp * parallel.ep * parallel.pp
        for size, keys in ((dense, "tp * cp * pp"), (expert, "etp * ep * pp")):
            if world_size % size:
                raise LayoutError(
                    f"parallel: {keys} = {size} does not divide the world of {world_size} ranks; "
                    f"start a multiple of {world_size_of(parallel)} ranks"
                )
        degrees = parallel.model_dump()
        return cls(**degrees, dp=world_size // dense, edp=world_size // expert, world_size=world_size)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, which are consecutive."""
        return self.world_size // self.pp

    def coordinates(self, rank: int) -> Coordinates:
        pp, in_stage = divmod(rank, self.stage_size)
        dp, in_replica = divmod(in_stage, self.tp * self.cp)
        cp, tp = divmod(in_replica, self.tp)
        edp, in_experts = divmod(in_stage, self.etp * self.ep)
        ep, etp = divmod(in_experts, self.etp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def leader(self, dp: int) -> int:
        """Rank that leads data-parallel replica `dp`."""
        return dp * self.tp * self.cp

    def replica_ranks(self, dp: int) -> list[int]:
        """Ranks of data-parallel replica `dp`, its leader first."""
        width = self.tp * self.cp
        return [stage * self.stage_size + dp * width + i for stage in range(self.pp) for i in range(width)]

    def split(self, num_layers: int) -> list[range]:
        """Layers of each stage, from 0, in the order of the model; virtual stage v of stage p is number v * pp + p."""
        stages = self.pp * self.vpp
        counts = list(self.stage_layers or [num_layers // stages] * stages)
        for stage in _middle_first(stages)[: num_layers - sum(counts)]:
            counts[stage] += 1
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def micro_batch_multiple(self) -> int:
        """What each replica's micro-batches divide by: the interleaved schedule takes them by the pp."""
        return self.pp if self.vpp > 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """What the length of a packed sequence divides by: context parallelism cuts each into 2 * cp chunks."""
        return 2 * self.cp if self.cp > 1 else 1


def _middle_first(stages: int) -> list[int]:
    """Stage numbers: those between the first and the last, then the last, then the first."""
    return [*range(1, stages - 1), stages - 1, 0]


def world_size_of(parallel: ParallelConfig) -> int:
    """The smallest world that the degrees divide; all others are its multiples."""
    return math.lcm(parallel.tp * parallel.cp, parallel.etp * parallel.ep) * parallel.pp


def parse_layout(text: str) -> tuple[ParallelConfig, int]:
    """`tp=2,pp=2,ep=2` -> the degrees and a world: the smallest, or with `dp=N` that of N data-parallel replicas.

    Raises LayoutError naming the part that is no degree, or is there twice.
    """
    known = (*DEGREES, "dp")
    degrees: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known or not value.isdecimal() or int(value) < 1:
            raise LayoutError(f"layout {text!r}: {part!r} is not a degree such as tp=2; known: {', '.join(known)}")
        if key in degrees:
            raise LayoutError(f"layout {text!r}: {key} is given twice")
        degrees[key] = int(value)
    dp = degrees.pop("dp", None)
    parallel = ParallelConfig.model_validate(degrees)
    if dp is None:
        return parallel, world_size_of(parallel)
    return parallel, parallel.tp * parallel.cp * parallel.pp * dp


def check_layout(layout: Layout, arch: Architecture, engine: EngineConfig) -> list[str]:
    """Contradictions with the model and the engine, each naming its keys; empty when the layout fits."""
    return [*_check_widths(layout, arch), *_check_stages(layout, arch), *check_engine(layout, arch, engine)]


def fitting_sizes(key: str, arch: Architecture) -> list[int]:
    """Sizes of degree `key` (tp, ep or etp) that cut the model evenly, smallest first."""
    largest = {"tp": arch.num_heads, "ep": arch.num_experts, "etp": arch.expert_hidden_size}[key]
    return [size for size in range(1, max(largest, 1) + 1) if _misfit(key, size, arch) is None]


def listed(sizes: Sequence[int]) -> str:
    """Returns `1, 2, 4, 8`; leaves out the middle of a long list."""
    short = sizes if len(sizes) <= MAX_SIZES else [*sizes[: MAX_SIZES - 1], "...", sizes[-1]]
    return ", ".join(map(str, short))


def _misfit(key: str, size: int, arch: Architecture) -> str | None:
    """Returns why a degree of `size` does not cut the model evenly."""
    heads = arch.num_kv_heads
    # With more ranks than key-value heads Megatron-Core gives each head to several ranks.
    if key == "tp" and arch.num_heads % size == 0 and max(size, heads) % min(size, heads):
        return f"is neither a divisor nor a multiple of the {heads} key-value heads of the model"
    for what, extent in _extents(key, arch):
        if extent % size:
            return f"does not divide the {extent} {what} of the model"
    return None


def _extents(key: str, arch: Architecture) -> Iterator[tuple[str, int]]:
    """Yields what degree `key` cuts in the model, and how many there are of it."""
    if key == "tp":
        yield "attention heads", arch.num_heads
        query_heads = 2 * arch.num_heads if arch.output_gate else arch.num_heads
        yield "rows of queries, keys and values", (query_heads + 2 * arch.num_kv_heads) * arch.head_dim
        if arch.delta_net:
            yield "key heads of the delta networks", arch.delta_net.key_heads
        if arch.dense_layers or not arch.num_experts:
            yield "features of the dense MLP", arch.ffn_hidden_size
        if arch.shared_hidden_size:
            yield "features of the shared expert", arch.shared_hidden_size
    elif key == "ep":
        yield "experts", max(arch.num_experts, 1)
    elif key == "etp":
        yield "features of each expert", arch.expert_hidden_size


def _check_widths(layout: Layout, arch: Architecture) -> Iterator[str]:
    if not arch.num_experts and (layout.ep > 1 or layout.etp > 1):
        yield f"parallel.ep, parallel.etp: {layout.ep}, {layout.etp} on a model without experts; both must be 1"
    for key in ("tp", "ep", "etp") if arch.num_experts else ("tp",):
        size = getattr(layout, key)
        if misfit := _misfit(key, size, arch):
            yield f"parallel.{key}: {size} {misfit}; sizes that fit: {listed(fitting_sizes(key, arch))}"


def _check_stages(layout: Layout, arch: Architecture) -> Iterator[str]:
    if layout.vpp > 1 and layout.pp == 1:
        yield f"parallel.vpp: {layout.vpp} virtual stages need pipeline stages; set parallel.pp above 1"
    stages, given = layout.pp * layout.vpp, layout.stage_layers
    if stages > arch.num_layers:
        yield (
            f"parallel.pp * parallel.vpp: {stages} stages, but the model has {arch.num_layers} layers; take at most "
            f"{arch.num_layers} (parallel.stage_layers may say how many layers each has)"
        )
    elif given is not None and (len(given) != stages or sum(given) != arch.num_layers):
        layout = dataclasses.replace(layout, stage_layers=None)
        even = [len(layers) for layers in layout.split(arch.num_layers)]
        yield (
            f"parallel.stage_layers: {list(given)} are {len(given)} stages with {sum(given)} layers, but parallel.pp * "
            f"parallel.vpp is {stages} and the model has {arch.num_layers} layers; write as {even}, or leave it out"
        )
