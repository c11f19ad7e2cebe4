"""Keeps memory that this process has freed, on a CPU."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 2**30
"""Larger tensors are given back when they are freed, and so are free bytes at the end of the heap beyond this many."""
MMAP_BYTES_BEFORE_GLIBC_2_35 = 2**25
"""The most that older versions allow."""


def keep_freed_memory() -> None:
    """Has malloc keep what it would give back to the kernel, for the rest of the process.

    By default large tensors are given back when they are freed, and the kernel fills the pages of the next one with
    zeros, which is a twentieth to a tenth of an update of the demo's model. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        if not mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
            mallopt(M_MMAP_THRESHOLD, MMAP_BYTES_BEFORE_GLIBC_2_35)
