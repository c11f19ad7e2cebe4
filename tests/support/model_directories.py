"""Hugging Face directories of tiny models, and stages to load them into."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models_reference import TINY, chunk_parameters, hf_shapes, stage_module, weight_names
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.binding import ModelRanks, bind
from megatron_rl.models.shards import assemble, fill
from megatron_rl.models.tensor_files import TensorFiles
from megatron_rl.models.weight import Weight

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@functools.cache
def _made(family: str, sharded: bool) -> tempfile.TemporaryDirectory[str]:
    """A directory that is made once and then copied."""
    made = tempfile.TemporaryDirectory()
    make_tiny_model(Path(made.name), **TINY[family])
    (Path(made.name) / "README.md").write_text("not to be copied")
    if sharded:
        model = AutoModelForCausalLM.from_pretrained(made.name)
        (Path(made.name) / "model.safetensors").unlink()
        model.save_pretrained(made.name, max_shard_size="4KB")
    return made


def make(directory: Path, family: str, *, sharded: bool = False) -> tuple[Path, Architecture]:
    shutil.copytree(_made(family, sharded).name, directory)
    return directory, read_architecture(directory)


def make_sharded(directory: Path) -> tuple[Path, Architecture]:
    return make(directory, "qwen3_moe", sharded=True)


def files_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def empty_stage(
    arch: Architecture, layers: Sequence[int] | None = None, dtype: torch.dtype = torch.float32, **ranks: Any
) -> nn.Module:
    layers = range(arch.num_layers) if layers is None else layers
    zeros = {name: torch.zeros(shape) for name, shape in hf_shapes(arch).items()}
    parameters = chunk_parameters(zeros, arch, layers, **ranks)
    return stage_module({n: torch.full_like(t, torch.nan, dtype=dtype) for n, t in parameters.items()}, layers)


def whole(stage: nn.Module, arch: Architecture) -> list[tuple[str, Tensor]]:
    """Returns the exported tensors of a single rank."""
    slots = bind([stage], arch, ModelRanks(), weight_names())
    return assemble((s.weight, [s.of(s.parameter.data)]) for s in slots)


def shards_of(weight: Weight, files: TensorFiles, size: int) -> list[Tensor]:
    """Returns every rank's shard of a weight, read from the files."""
    shards = [torch.full(weight.cut(rank, size)[0], torch.nan) for rank in range(size)]
    for rank, shard in enumerate(shards):
        fill(weight, shard, files.read, rank, size)
    return shards


def edit(directory: Path, change: Callable[..., object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
