"""Several training runs, one after another, in one world of ranks.

Each run is a list of overrides. A bf16 run without data parallelism writes its optimizer's fp32 weights to
run_dir/main.safetensors.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config


def save_main_weights(policy, file: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    # The weights are flat but complete, because without data parallelism the optimizer does not shard them.
    buckets = list(policy.export(1 << 30, tensor_of=lambda p: p.main_param.view(p.shape)))
    if policy.place.rank == 0:
        save_file({name: tensor.contiguous() for bucket in buckets for name, tensor in bucket}, file)


def main(config_file: Path, runs: list[str]) -> None:
    from megatron_rl.engine.network import Network
    from megatron_rl.loop.trainer import Trainer
    from megatron_rl.train import train

    export = Trainer.export

    def export_both(trainer: Trainer, network: Network, directory: Path, bucket_mib: int = 256) -> None:
        if trainer.config.engine.dtype == "bf16" and trainer.layout.dp == trainer.layout.edp == 1:
            save_main_weights(trainer.policy, directory.with_name("main.safetensors"))
        export(trainer, network, directory, bucket_mib)

    Trainer.export = export_both  # type: ignore[assignment,method-assign]
    for overrides in runs:
        train(load_config(Config, config_file, overrides.split()))
