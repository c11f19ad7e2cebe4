"""Transformer Engine without a GPU: its own Python, over stand-ins for what is compiled.

Call `load(directory)`, which makes the package in `directory` importable, before use_device("cpu"). Then import
Megatron-Core and call `install_kernels()`, which puts arithmetic on the CPU behind the few functions that Megatron-Core
calls. Each such call is bound to Transformer Engine's own signature first, so that a wrong argument is a TypeError.

What this shows: that the modules are built, marked, loaded, exported and called as Transformer Engine and Megatron-Core
expect of each other, and that gradients are reduced over the right ranks. What it cannot show: anything of the kernels
(their numbers, dtypes and speed), of attention under context parallelism, of DeepEP and of NCCL.
"""

from te_stub.compiled import load
from te_stub.kernels import install_kernels

__all__ = ["install_kernels", "load"]
