"""Runs several trainings one after another in one world of ranks, so that each does not pay for start-up.

torchrun ... train_worker.py CONFIG "key=value key=value" "key=value" ...    (one run for each list of overrides)

A bf16 run under a layout without data parallelism leaves its optimizer's fp32 weights in run_dir/main.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.engine.device import use_device


def save_main_weights(policy, file: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    # Flat, and whole: the distributed optimizer has nobody to share them with.
    buckets = list(policy.export(1 << 30, tensor_of=lambda p: p.main_param.view(p.shape)))
    if policy.place.rank == 0:
        save_file({name: tensor.contiguous() for bucket in buckets for name, tensor in bucket}, file)


if __name__ == "__main__":
    use_device("cpu")
    import torch.distributed as dist

    from megatron_rl.engine.network import Network
    from megatron_rl.loop.trainer import Trainer
    from megatron_rl.train import train

    export = Trainer.export

    def export_both(trainer: Trainer, network: Network, directory: Path) -> None:
        if trainer.config.engine.dtype == "bf16" and trainer.layout.dp == trainer.layout.edp == 1:
            save_main_weights(trainer.policy, directory.with_name("main.safetensors"))
        export(trainer, network, directory)

    Trainer.export = export_both  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    for overrides in sys.argv[2:]:
        train(load_config(Config, Path(sys.argv[1]), overrides.split()))
    dist.destroy_process_group()
