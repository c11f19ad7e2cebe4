"""Rounding of weights in float64, from the definitions: the numbers of each format are listed, the nearest is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

QUANTISED = re.compile(r".*\.(self_attn\.[qkvo]_proj|mlp(\.experts\.\d+)?\.(gate|up|down)_proj)\.weight")
"""Names of the linear layers and experts of a Qwen3 checkpoint: neither routers, norms, embedding nor head."""


def e4m3_numbers() -> np.ndarray:
    """All finite numbers of fp8 e4m3 in order: 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                found += [value, -value]
    return np.unique(found)


def integers(bits: int) -> np.ndarray:
    largest = 2 ** (bits - 1) - 1
    return np.arange(-largest, largest + 1, dtype=np.float64)


def rounded(weight: np.ndarray, numbers: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The nearest of scale * numbers for each weight; each rows x columns cell has its scale."""
    result = np.zeros(weight.shape)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            cell = weight[top : top + rows, left : left + columns].astype(np.float64)
            grid = numbers * (np.abs(cell).max() / numbers.max())
            nearest = np.abs(cell[..., None] - grid).argmin(-1)
            result[top : top + rows, left : left + columns] = grid[nearest]
    return result


def copy_changed(model: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Writes a model whose quantised weights are changed; returns its directory."""
    tensors = load_file(model / "model.safetensors")
    for name in filter(QUANTISED.fullmatch, list(tensors)):
        tensors[name] = torch.from_numpy(change(tensors[name].numpy())).to(tensors[name].dtype)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in (file for file in model.iterdir() if file.name != "model.safetensors" and file.is_file()):
        (target / file.name).write_bytes(file.read_bytes())
    return target
