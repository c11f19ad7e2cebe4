"""Figures of GPUs from the vendor's data sheets. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense figures."""

    memory_gib: float  # that a process sees
    flops: float  # bf16, a second
    hbm: float  # bytes a second
    nvlink: float  # bytes a second, one direction
    network: float  # bytes a second of a GPU's own adapter, one direction


GPUS = {
    "a100": Gpu(79, 312e12, 2.0e12, 300e9, 25e9),
    "h100": Gpu(79, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(140, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu(179, 2250e12, 8.0e12, 900e9, 50e9),
}


def gpu_of(device_name: str) -> Gpu | None:
    """Returns the figures of the GPU that CUDA calls so, such as "NVIDIA H100 80GB HBM3"; None for another one.

    The PCIe cards of these names are slower, so they have none.
    """
    words = device_name.lower().replace("-", " ").split()
    if "pcie" in words or "nvl" in words:
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
