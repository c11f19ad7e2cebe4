"""The fixture that the fuzzers of this folder share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest


@pytest.fixture
def seen() -> Iterator[Counter[str]]:
    """Counts accepted and refused examples. A test that only accepts or only refuses fails."""
    counts: Counter[str] = Counter()
    yield counts
    print(dict(counts))  # shown with -s
    assert set(counts) == {"accepted", "refused"}
