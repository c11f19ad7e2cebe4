"""Random choices of experts on every rank, and the loads that `reduce_stats` makes of them."""

from __future__ import annotations

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.engine.device import use_device

LAYERS, EXPERTS, TOP_K, MICRO_BATCHES, ROWS = (0, 2), 8, 2, 3, 5


def chosen(rank: int, micro_batch: int, layer: int) -> list[list[int]]:
    """Returns [ROWS, TOP_K] experts, skewed towards the first ones; the last row is padding."""
    import numpy as np

    rng = np.random.default_rng([rank, micro_batch, layer])
    weights = np.arange(EXPERTS, 0, -1.0) ** 2
    return [rng.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum()).tolist() for _ in range(ROWS)]


def reduced(layouts: list[str]) -> dict[str, dict[str, float]]:
    """Returns the metrics of each layout."""
    device = use_device("cpu")
    import torch
    from taps import of_logits

    from megatron_rl.ranks.place import start_process_groups, stop_process_groups
    from megatron_rl.routing.drift import RoutingStats
    from megatron_rl.routing.exchange import reduce_stats

    found = {}
    valid = torch.arange(ROWS) < ROWS - 1
    for text in layouts:
        layout = Layout.resolve(*parse_layout(text))
        place = start_process_groups(layout, device, seed=0)
        stats = RoutingStats(LAYERS, EXPERTS, TOP_K, device, micro_batches=MICRO_BATCHES, expert_ranks=layout.ep)
        for micro_batch in range(MICRO_BATCHES):
            for layer in LAYERS:
                ids = torch.tensor(chosen(place.rank, micro_batch, layer))
                stats.observe_router(micro_batch, layer, of_logits(torch.zeros(ROWS, EXPERTS)), ids, ids, None, valid)
        found[text] = reduce_stats(stats, place).finalize()
        stop_process_groups(leave_world=False)
    return found
