"""Model directories in fp8 as they are published, written block by block in plain loops, and what they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Size = tuple[int, int]
QUANTISED = re.compile(r".*(_proj|_qkv|_z|experts\..*)\.weight")
"""Names of the weights that publishers quantise: no norms, routers, embeddings or output layers."""


def blocks_of(weight: Tensor, size: Size) -> Iterator[tuple[Size, tuple[slice, slice]]]:
    """Yields place and positions of each block."""
    for down, top in enumerate(range(0, weight.shape[0], size[0])):
        for across, left in enumerate(range(0, weight.shape[1], size[1])):
            yield (down, across), (slice(top, top + size[0]), slice(left, left + size[1]))


def quantise(weight: Tensor, size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns fp8 values and scales, in `dtype`; the largest value of a block is near 448."""
    places = [place for place, _ in blocks_of(weight, size)]
    scales = torch.empty(places[-1][0] + 1, places[-1][1] + 1, dtype=dtype)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for place, where in blocks_of(weight, size):
        scales[place] = weight[where].abs().max() / 448
        values[where] = (weight[where] / scales[place].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales


def values_of(values: Tensor, scales: Tensor, size: Size) -> Tensor:
    """Returns the fp32 weight that fp8 values and scales stand for."""
    weight = torch.full(values.shape, torch.nan)
    for place, where in blocks_of(values, size):
        weight[where] = values[where].float() * scales[place].item()
    return weight


def quantise_model(directory: Path, size: Size = (128, 128), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Quantises a model directory in place; returns the weights that it then stands for, in fp32 if quantised."""
    meaning: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        written: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            meaning[name] = written[name] = tensor
            if QUANTISED.fullmatch(name):
                values, scales = quantise(tensor, size, dtype)
                written |= {name: values, f"{name}_scale_inv": scales}
                meaning[name] = values_of(values, scales, size)
        save_file(written, file, metadata={"format": "pt"})
        _extend_index(directory / "model.safetensors.index.json", file.name, written)
    set_config(directory, quantization_config=published(size))
    return meaning


def published(size: Size = (128, 128), **fields: Any) -> dict[str, Any]:
    """Returns a quantization_config as Qwen3-*-FP8 have it."""
    common = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(size)}
    return {**common, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"], **fields}


def set_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _extend_index(index: Path, file: str, names: dict[str, Tensor]) -> None:
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(names, file)
        index.write_text(json.dumps(content))
