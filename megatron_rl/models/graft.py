"""One model with another's weights of some kinds, such as its routers. Needs no ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rl.disk import writes
from megatron_rl.models.architecture import differences, read_architecture
from megatron_rl.models.check import check_weights
from megatron_rl.models.fields import ModelError
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.models.registry import kinds_of, tensors_of
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, save_weights


@dataclass(frozen=True)
class Graft:
    """How many tensors of the new model come from each of the two."""

    taken: int
    kept: int


def graft(donor: Path, base: Path, out: Path, kinds: Collection[PolicyKind]) -> Graft:
    """Writes a model directory: `base`, its tokenizer and config.json included, with the donor's weights of `kinds`.

    Each tensor keeps the dtype in which its file stores it; weights in fp8 become bf16. The directory appears whole or
    not at all. At most MAX_SHARD_BYTES and one tensor are in memory.

    Raises FileInTheWayError if `out` exists, DiskError if it cannot be written, and ModelError for two architectures,
    for a kind that the models lack, and for files of either model that are damaged or hold NaN or infinity.
    """
    arch = read_architecture(base)
    if differing := differences(read_architecture(donor), arch):
        raise ModelError(f"{donor} is of another architecture than {base}: {'; '.join(differing)}")
    held = kinds_of(arch)
    if lacking := [kind for kind in kinds if kind not in held]:
        raise ModelError(f"{base} has no weights of kind {' or '.join(lacking)}; it has {', '.join(held)}")
    for directory in (donor, base):
        check_weights(directory)
    sources = {parts: kind in kinds for parts, kind in tensors_of(arch).items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        theirs, ours = TensorFiles(donor), TensorFiles(base)
        for parts, is_taken in sources.items():
            yield parts[0].name, (theirs if is_taken else ours).whole(parts)

    with writes(f"the model in {out}", out, then="start again"):
        save_weights(tensors(), out, base, MAX_SHARD_BYTES, None)
    taken = sum(sources.values())
    return Graft(taken, len(sources) - taken)
