"""Runs several trainings one after another in one world of ranks, so that each does not pay for start-up.

torchrun ... train_worker.py CONFIG "key=value key=value" "key=value" ...    (one run for each list of overrides)
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.engine.device import use_device

if __name__ == "__main__":
    use_device("cpu")
    import torch.distributed as dist

    from megatron_rl.train import train

    dist.init_process_group("gloo")
    for overrides in sys.argv[2:]:
        train(load_config(Config, Path(sys.argv[1]), overrides.split()))
    dist.destroy_process_group()
