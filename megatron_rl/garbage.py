"""Sets how often Python looks for reference cycles."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Raises the thresholds of Python's garbage collector for the rest of the process.

    The import of torch and Megatron-Core makes about a million objects that stay. At the default thresholds a fifth of
    the import's time goes into visiting them again and again.
    """
    gc.set_threshold(50_000, 20, 50)
