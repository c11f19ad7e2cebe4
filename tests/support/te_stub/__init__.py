"""Transformer Engine without a GPU: its own Python code over stand-ins for its compiled parts.

Call `load(directory)`, which makes the package in `directory` importable, before use_device("cpu"). Then import
Megatron-Core and call `install_kernels()`, which implements on the CPU the few functions that Megatron-Core
calls. Each such call is bound to Transformer Engine's own signature first, so that a wrong argument is a TypeError.

This tests that modules are built, marked, loaded, exported and called as Transformer Engine and Megatron-Core expect,
that gradients are reduced over the right ranks, and that under context parallelism ranks hold the tokens that
Transformer Engine takes them to hold. It cannot test kernels (their numbers, dtypes and speed), exchanges of attention,
DeepEP or NCCL.
"""

from te_stub.compiled import load
from te_stub.kernels import install_kernels

__all__ = ["install_kernels", "load"]
