"""Stress on demand: changes exported weights on their way to the servers (the section `weights.stress`).

Whole tensors under their names in Hugging Face's files are changed, so a change does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_rl.config.stress import QUANTISED, Fp8, Integer, Noise, NoStress, Stress, StressConfig, Target
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.registry import weights_of
from megatron_rl.models.weight import Source, Weight
from megatron_rl.weights.all_servers import Bucket
from megatron_rl.weights.quantise import BLOCK, relative_error, round_to_fp8, round_to_integers, seed_of, with_noise


class WeightStress:
    """The change that a run makes to the weights of its servers. Every rank has one."""

    def __init__(self, config: Stress, arch: Architecture, seed: int) -> None:
        """`seed` is the run's."""
        self._config = config
        self._seed = seed
        targets = QUANTISED if config.targets is None else config.targets
        self._sources: dict[str, list[Source]] = {}
        for weight in weights_of(arch):
            if target_of(weight) in targets:
                for source in weight.sources:
                    self._sources.setdefault(source.name, []).append(source)
        self.names = frozenset(self._sources)
        """Names of the tensors that are changed."""

    def change(self, name: str, weight: Tensor, version: int) -> Tensor:
        """Returns a tensor as the servers get it with weight version `version`; untargeted ones are returned as is."""
        if name not in self.names:
            return weight
        if isinstance(self._config, Noise):
            return with_noise(weight, self._config.size, seed_of(self._seed, version, name))
        changed = weight.clone()
        for source in self._sources[name]:
            source.of(changed).copy_(self._round(source.of(weight)))
        return changed

    def _round(self, matrix: Tensor) -> Tensor:
        """Rounds [out, in], the whole of a tensor or one expert's part of it."""
        if isinstance(self._config, Fp8):
            return round_to_fp8(matrix, BLOCK if self._config.scale == "block" else None)
        assert isinstance(self._config, Integer)
        return round_to_integers(matrix, bits={"int8": 8, "int4": 4}[self._config.kind])


class StressedBuckets:
    """Buckets of exported weights as the servers get them, changed in place one by one while they are read."""

    def __init__(self, buckets: Iterable[Bucket], stress: WeightStress, version: int) -> None:
        self._buckets = buckets
        self._stress = stress
        self._version = version
        self._worst = torch.zeros(())

    def __iter__(self) -> Iterator[Bucket]:
        for bucket in self._buckets:
            for name, weight in bucket:
                self._change(name, weight)
            yield bucket
            del bucket

    @property
    def relative_error(self) -> float:
        """The largest relative error of a tensor, of those read so far."""
        return self._worst.item()

    def _change(self, name: str, weight: Tensor) -> None:
        changed = self._stress.change(name, weight, self._version)
        if changed is not weight:
            self._worst = torch.maximum(self._worst.to(weight.device), relative_error(changed, weight))
            weight.copy_(changed)


def read_stress(config: StressConfig, arch: Architecture, seed: int) -> WeightStress | None:
    """Returns None for kind none."""
    return None if isinstance(config, NoStress) else WeightStress(config, arch, seed)


def target_of(weight: Weight) -> Target | None:
    """Returns the target that a weight belongs to; None for a norm. A copy of tied embeddings is the embedding."""
    if len(weight.sources[0].shape) < 2:
        return None
    match weight.kind:
        case "embedding":
            return "head" if weight.name.startswith("output_layer.") and not weight.copy else "embedding"
        case "attention":
            return "attention"
        case "expert":
            return "expert"
        case "router":
            return "router"
        case _:
            return "mlp"
