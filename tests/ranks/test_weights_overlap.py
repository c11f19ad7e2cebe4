"""A server on a CPU loads a bucket of weights while the next one arrives."""

from __future__ import annotations

import pytest
from forks import Forks


@pytest.mark.distributed
def test_a_bucket_is_loaded_while_the_next_one_arrives_and_the_last_one_at_the_end(forks: Forks) -> None:
    """A bucket is loaded only once the next one is sent, which is never if the server loads before it listens."""
    _, loaded = forks.world(2, "overlap_worker:loads_while_the_next_arrives", timeout=60.0)
    assert loaded == [("0", 0.0), ("1", 1.0), ("2", 2.0)]


@pytest.mark.distributed
def test_a_bucket_that_cannot_be_loaded_fails_the_next_call(forks: Forks) -> None:
    _, error = forks.world(2, "overlap_worker:refuses_the_first", timeout=60.0)
    assert error == "a shape is wrong"
