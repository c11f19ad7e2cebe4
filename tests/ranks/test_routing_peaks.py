"""The fullest expert-parallel rank of a micro-batch, counted by hand in every kind of expert layout."""

from __future__ import annotations

import numpy as np
import pytest
from forks import Forks
from peak_worker import EXPERTS, LAYERS, MICRO_BATCHES, ROWS, chosen

# Layout of four ranks -> ranks that dispatch tokens to each other. Expert ranks are numbered etp first, then ep.
SHARERS = {
    "ep=2,dp=4": [[0, 1], [2, 3]],
    "ep=4": [[0, 1, 2, 3]],
    "tp=2,ep=2,dp=2": [[0, 1], [2, 3]],
    "tp=2,ep=2,etp=2": [[0, 1, 2, 3]],
    "cp=2,ep=2,dp=2": [[0, 1], [2, 3]],
}


@pytest.mark.distributed
def test_the_peak_is_the_fullest_rank_of_the_worst_micro_batch(forks: Forks) -> None:
    for found in forks.world(4, "peak_worker:reduced", list(SHARERS)):
        for text, groups in SHARERS.items():
            expert_ranks = 4 if text == "ep=4" else 2
            for layer in LAYERS:
                peaks = []
                for group in groups:
                    for micro_batch in range(MICRO_BATCHES):
                        ids = [e for rank in group for row in chosen(rank, micro_batch, layer)[: ROWS - 1] for e in row]
                        loads = np.bincount(np.array(ids) * expert_ranks // EXPERTS, minlength=expert_ranks)
                        peaks.append(loads.max() / loads.mean())
                assert found[text][f"routing/ep_peak/layer_{layer:02d}"] == pytest.approx(max(peaks)), text
