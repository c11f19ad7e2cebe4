"""Whose memory a GPU holds in each turn of a run with rollout.servers.colocate, read from the device and from torch.

    python benchmarks/shared_gpu.py megatron_rl/demo/gspo.yaml rollout.servers.colocate=true weights.route=ipc

It trains as `megatron-rl train` does, on one rank, and prints a line after each turn. On a GPU its status is 1 unless
the trainer keeps less than a tenth while servers sample, and servers free more than half while it trains. On a CPU it
prints the turns alone.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config

GIB = 1 << 30


def main(config: Path, overrides: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    loaded = load_config(Config, config, overrides or [])
    import torch

    from megatron_rl.loop import turns
    from megatron_rl.train import train

    names = {turns.SAMPLING: "sampling", turns.TRAINING: "training", turns.SYNC: "sync"}
    trainers: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    take = turns.GpuTurns.take

    def measured(self: turns.GpuTurns, turn: turns.Turn) -> None:
        take(self, turn)
        name = names[turn]
        if not torch.cuda.is_available():
            print(f"turn: {name}", flush=True)
        elif self.servers is not None:
            free, total = torch.cuda.mem_get_info()
            own = torch.cuda.memory_reserved()
            trainers[name].append(own / GIB)
            others[name].append((total - free - own) / GIB)
            print(f"turn: {name}: trainer {own / GIB:.2f} GiB, others {(total - free - own) / GIB:.2f} GiB", flush=True)

    turns.GpuTurns.take = measured  # type: ignore[method-assign]
    train(loaded)
    if torch.cuda.is_available():
        kept = max(trainers["sampling"][1:]) / max(trainers["sync"])
        left = max(others["training"]) / max(others["sampling"])
        print(
            f"while servers sample the trainer keeps {kept:.3f} of its part in a sync; while it trains the servers keep"
        )
        print(f"{left:.3f} of theirs, contexts of processes included")
        raise typer.Exit(int(kept > 0.1 or left > 0.5))


if __name__ == "__main__":
    typer.run(main)
