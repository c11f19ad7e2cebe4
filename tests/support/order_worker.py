"""A weight sync to slow servers; it fails if a rank does not wait for them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.weights.all_servers import Sent
from megatron_rl.weights.sync import WeightSync


class SlowRoute:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def push(self, buckets: object, version: int) -> Sent:
        time.sleep(1.0)
        self._marker.touch()
        return Sent(0, {})


def main(marker: Path) -> None:
    place = SimpleNamespace(control=dist.group.WORLD)
    policy = SimpleNamespace(place=place, arch=None, export=lambda bucket_bytes, reuse: iter([[]]))
    sync = WeightSync(WeightsConfig(), policy, None, Path(), temperature=1.0, seed=0)  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        sync._route = SlowRoute(marker)  # type: ignore[assignment]
    sync._measured = lambda sent, start: {}  # type: ignore[method-assign]
    sync._verify = lambda version: {}  # type: ignore[method-assign]  # there are no servers to ask
    sync.push(1)
    assert marker.exists(), f"rank {dist.get_rank()} left before the servers had the weights"
