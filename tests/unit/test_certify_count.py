"""How the rows of tokens are counted: those of padding, and those whose live choice is their trace by chance."""

from __future__ import annotations

import pytest
from models_reference import moe_architecture

from megatron_rl.certify.router_watch import _count
from megatron_rl.certify.samples import LENGTHS, make_trace

# rows of one token in one layer that used its trace, its live choice, neither, or a trace that is the live choice
CASES = {
    "replayed": ([1, 0, 0, 0], (1, 0, 0)),
    "replayed, and a copy in padding routed live": ([1, 0, 1, 0], (1, 0, 0)),
    "two rows used the trace": ([2, 0, 0, 0], (0, 0, 0)),
    "the copy in padding chose the trace by chance": ([1, 0, 0, 1], (1, 0, 0)),
    "both rows chose the trace by chance": ([0, 0, 0, 2], (1, 0, 0)),
    "not replayed": ([0, 0, 1, 0], (0, 0, 1)),
    "without a trace": ([0, 1, 0, 0], (0, 1, 0)),
    "without a trace, and not live": ([0, 0, 2, 0], (0, 0, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_token_are_counted(case: str) -> None:
    counts, (replayed, live, strange) = CASES[case]
    trace = make_trace(moe_architecture(num_layers=1, dense_layers=()), 0, LENGTHS[0])
    found = _count({"0:0": counts}, [trace], 1)
    assert (found.replayed, found.live, found.strange) == (replayed, live, strange)
    present = int(trace.present.sum())
    assert (found.expected_replayed, found.expected_live) == (present, LENGTHS[0] - present)
