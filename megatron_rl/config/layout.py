"""Layouts: how a world of ranks divides into tensor, pipeline, context, expert and data parallelism. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rl.config.schema import EngineConfig, ParallelConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture


class LayoutError(UserError):
    """Degrees of parallelism that do not fit together, the world or the model."""


@dataclass(frozen=True)
class Layout:
    """Attention ranks: world = tp * cp * dp * pp, tp fastest; expert ranks: world = etp * ep * edp * pp."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    edp: int
    world_size: int

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """Raises LayoutError when the degrees do not divide the world."""
        dense = parallel.tp * parallel.cp * parallel.pp
        expert = parallel.etp * parallel.ep * parallel.pp
        for size, keys in ((dense, "tp * cp * pp"), (expert, "etp * ep * pp")):
            if world_size % size:
                raise LayoutError(
                    f"parallel: {keys} = {size} does not divide the world of {world_size} ranks; "
                    f"start a multiple of {_smallest_world(parallel)} ranks"
                )
        degrees = parallel.model_dump()
        return cls(**degrees, dp=world_size // dense, edp=world_size // expert, world_size=world_size)


def _smallest_world(parallel: ParallelConfig) -> int:
    return math.lcm(parallel.tp * parallel.cp, parallel.etp * parallel.ep) * parallel.pp


def parse_layout(text: str) -> tuple[ParallelConfig, int]:
    """`tp=2,pp=2,ep=2` (dp=N too) -> the degrees and the world they need. Raises LayoutError naming the part."""
    degrees: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in (*ParallelConfig.model_fields, "dp") or not value.isdigit() or int(value) < 1:
            known = ", ".join((*ParallelConfig.model_fields, "dp"))
            raise LayoutError(f"layout {text!r}: {part!r} is not a degree such as tp=2; known: {known}")
        degrees[key] = int(value)
    dp = degrees.pop("dp", None)
    parallel = ParallelConfig(**degrees)
    if dp is None:
        return parallel, _smallest_world(parallel)
    return parallel, parallel.tp * parallel.cp * parallel.pp * dp


def check_layout(layout: Layout, arch: Architecture, engine: EngineConfig) -> list[str]:
    """Contradictions with the model, each naming its keys; empty when the layout fits."""
    problems = []

    def divides(key: str, degree: int, what: str, size: int) -> None:
        if size % degree:
            problems.append(f"parallel.{key}: {degree} does not divide the {size} {what} of the model")

    divides("tp", layout.tp, "attention heads", arch.num_heads)
    divides("tp", layout.tp, "key-value heads", arch.num_kv_heads)
    if len(arch.dense_layers) or not arch.num_experts:
        divides("tp", layout.tp, "features of the dense MLP", arch.ffn_hidden_size)
    if arch.num_experts:
        divides("ep", layout.ep, "experts", arch.num_experts)
        divides("etp", layout.etp, "features of each expert", arch.expert_hidden_size)
    elif layout.ep > 1 or layout.etp > 1:
        problems.append(f"parallel.ep, parallel.etp: {layout.ep}, {layout.etp} on a model without experts")
    if layout.vpp > 1 and layout.pp == 1:
        problems.append("parallel.vpp: virtual stages need pipeline stages; set parallel.pp above 1")
    if arch.num_layers % (layout.pp * layout.vpp):
        problems.append(
            f"parallel.pp * parallel.vpp: {layout.pp * layout.vpp} does not divide the {arch.num_layers} layers; "
            "uneven stages are not supported"
        )
    return problems
