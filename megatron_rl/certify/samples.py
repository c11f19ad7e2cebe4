"""Makes the certified batch: every token has its own id, and every row of every trace has its own experts.

The experts are drawn from (sample, position, layer), so an offset by one row, layer or sample is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.models.architecture import Architecture

LENGTHS = (24, 17, 31, 24, 8, 40, 13, 31, 22, 9, 35, 16)
"""Lengths of the samples in tokens. They are unequal, so that packing, padding and cutting fall on odd places."""


@dataclass(frozen=True)
class Token:
    """The row of a trace that a token's id stands for."""

    sample: int
    position: int


def first_id(sample: int) -> int:
    return sum(LENGTHS[:sample])


def token_of(token_id: int) -> Token:
    ends = np.cumsum(LENGTHS)
    sample = int(np.searchsorted(ends, token_id, side="right"))
    return Token(sample, token_id - first_id(sample))


def make_samples(arch: Architecture) -> list[Sample]:
    """Samples whose traces end one row early, as a rollout engine's do. Some lack rows inside; one sample has none."""
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = range(first_id(number), first_id(number) + length)
        prompt = Prompt(f"certificate:{number}", "", tuple(ids[:4]), "", "")
        sample = Sample.start(prompt, 0).extend(list(ids[4:]), [-1.0] * (length - 4), weight_version=0)
        samples.append(sample.with_trace(make_trace(arch, number, length)))
    return samples


def make_trace(arch: Architecture, sample: int, length: int) -> RoutingTrace:
    layers = arch.moe_layers
    ids = np.empty((length - 1, len(layers), arch.experts_per_token), dtype=np.int32)
    for column, layer in enumerate(layers):
        for row in range(length - 1):
            rng = np.random.default_rng([sample, row, layer])
            ids[row, column] = rng.permutation(arch.num_experts)[: arch.experts_per_token]
    if sample % 3 == 1:
        ids[length // 2 : length // 2 + 3] = -1
    if sample == len(LENGTHS) - 1:
        ids[:] = -1
    versions = (VersionSpan(0, 0, length - 1),)
    return RoutingTrace.from_ids(ids, layers=layers, num_experts=arch.num_experts, source="rollout", versions=versions)


def trace_of(sample: Sample) -> RoutingTrace:
    assert sample.trace is not None
    return sample.trace
