"""Writes a quantised model in bf16, as transformers and the weight sync to rollout servers need it. Needs no ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rl.disk import writes
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.fields import ModelError
from megatron_rl.models.quantisation import FIELD, read_quantisation
from megatron_rl.models.registry import tensors_of
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, save_weights


@dataclass(frozen=True)
class Dequantised:
    """How many tensors of the copy were in fp8 or mxfp4, and how many were not."""

    converted: int
    kept: int


def dequantise(model: Path, out: Path) -> Dequantised:
    """Writes a copy of a quantised model directory: weights in fp8 or mxfp4 become bf16, and others keep their
    dtype.

    The copy's config.json has no quantization_config. The directory appears whole or not at all. At most
    MAX_SHARD_BYTES and one tensor are in memory.

    Raises FileInTheWayError if `out` exists, DiskError if it cannot be written, and ModelError for a model that is not
    quantised, and for files that are damaged or hold NaN or infinity.
    """
    arch = read_architecture(model)
    if read_quantisation(model) is None:
        raise ModelError(f"{model / 'config.json'} has no {FIELD}; there is nothing to convert")
    check_weights(model)
    files = TensorFiles(model)
    sources = list(tensors_of(arch))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for parts in sources:
            yield parts[0].name, files.whole(parts)

    with writes(f"the model in {out}", out, then="start again"):
        save_weights(tensors(), out, model, MAX_SHARD_BYTES, None)
    converted = sum(files.is_quantised(parts[0]) for parts in sources)
    return Dequantised(converted, len(sources) - converted)
