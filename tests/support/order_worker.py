"""torchrun ... order_worker.py MARKER: a weight sync whose servers take their time; fails if a rank does not wait."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.weights.sync import WeightSync


class SlowRoute:
    def push(self, buckets: object, version: int) -> int:
        time.sleep(1.0)
        Path(sys.argv[1]).touch()
        return 0


if __name__ == "__main__":
    dist.init_process_group("gloo")
    place = SimpleNamespace(control=dist.group.WORLD)
    policy = SimpleNamespace(place=place, export=lambda bucket_bytes: iter([[]]))
    sync = WeightSync(WeightsConfig(), policy, None, Path(), temperature=1.0)  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        sync._route = SlowRoute()  # type: ignore[assignment]
    sync._verify = lambda version: {}  # type: ignore[method-assign]  # there are no servers to ask
    sync.push(1)
    assert Path(sys.argv[1]).exists(), f"rank {dist.get_rank()} left before the servers had the weights"
    dist.destroy_process_group()
