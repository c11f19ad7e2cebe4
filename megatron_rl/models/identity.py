"""Digests of a model directory's files: whether it is still the one that a run began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_rl.models.weights_io import COMPANIONS

WHOLE_BYTES = 64 << 20
SAMPLES = 32
SAMPLE_BYTES = 1 << 16


def file_digests(model_dir: Path) -> dict[str, str]:
    """Returns a digest of each file that a trainer, a server or a tokenizer reads, by name.

    A file above WHOLE_BYTES is sampled: its size, and SAMPLES stretches of SAMPLE_BYTES, evenly spaced, its first bytes
    (the names, shapes and places of all tensors) and its last among them. So a large model takes a second, and any
    training changes the digest. A change that spares all stretches is not seen.
    """
    patterns = (*COMPANIONS, "*.safetensors", "*.safetensors.index.json")
    files = {file for pattern in patterns for file in Path(model_dir).glob(pattern) if file.is_file()}
    return {file.name: _digest(file) for file in sorted(files)}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(size).encode())
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            sha.update(file.read(SAMPLE_BYTES))
        return "sampled:" + sha.hexdigest()
