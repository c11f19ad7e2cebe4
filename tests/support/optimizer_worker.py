"""optimizer_worker.py ROOT TE_DIRECTORY KIND: optimizers that keep their memory elsewhere, on two ranks.

It runs the CASES of a kind by settings_worker, with Transformer Engine's own FusedAdam over tests/support/te_stub, and
Megatron-Core's own HybridDeviceOptimizer over a host that is pretended. ROOT/model is the model; rank 0 writes
ROOT/answers.pt. With `checkpoints`, checkpoints of both are then read under another layout.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pretended_host import pretended_host
from settings_worker import Case
from te_worker import prepare, run_world

PLAIN = Case(layout="dp=2", engine=(("dtype", "bf16"),), host=True)
SHARP = replace(PLAIN, layout="tp=2,ep=2", critic=True)
ROUNDED = (("dtype", "bf16"), ("grad_dtype", "bf16"))
ALL, HALF, BF16 = (("offload", 1.0),), (("offload", 0.5),), (("moments_dtype", "bf16"),)
KEPT = {"all on the host": ALL, "half on the host": HALF, "bf16": BF16}
BOTH = {"plain": PLAIN} | {name: replace(PLAIN, optim=optim) for name, optim in KEPT.items()}
CASES = {
    "numbers": {
        **BOTH,
        "gradients": replace(PLAIN, engine=ROUNDED),
        "gradients, half on the host": replace(PLAIN, engine=ROUNDED, optim=HALF),
        "gradients, bf16": replace(PLAIN, engine=ROUNDED, optim=BF16),
        "critic": SHARP,
        "critic, all on the host": replace(SHARP, optim=ALL),
        "critic, bf16": replace(SHARP, optim=BF16),
    },
    "checkpoints": {
        **BOTH,
        **{f"{name}, restored": replace(PLAIN, optim=optim, restores=True) for name, optim in KEPT.items()},
    },
}


def train(rank: int, root: Path, kind: str) -> None:
    import reshard_worker  # imports Megatron-Core, which looks for Transformer Engine
    import settings_worker
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    answers = settings_worker.main(root, list(CASES[kind].values()))
    if rank == 0:
        torch.save(dict(zip(CASES[kind], answers, strict=True)), root / "answers.pt")
    if kind == "checkpoints":
        with pretended_host():
            for optim in (BF16, HALF):
                folder = root / optim[0][0]
                reshard_worker.main(root / "model", folder, "dp=2", ["tp=2", "pp=2"], "bf16", dict(optim))
            without_offload(root / "model", root / "offload" / "pp=2")
    dist.destroy_process_group()


def without_offload(model: Path, checkpoint: Path) -> None:
    """Reads a checkpoint of an optimizer on the host without one, and the other way round."""
    import reshard_worker as worker

    network = worker.build(model, "pp=2", "bf16", optim=dict(HALF))
    worker.load(checkpoint, network)
    expected = worker.held(network)
    network = worker.build(model, "pp=2", "bf16")
    worker.load(checkpoint, network)
    worker.check(expected, worker.held(network), "offload -> plain")
    worker.save(model.parent / "plain", network)
    network = worker.build(model, "pp=2", "bf16", optim=dict(ALL))
    worker.load(model.parent / "plain", network)
    worker.check(expected, worker.held(network), "plain -> offload")
    worker.train(network)


if __name__ == "__main__":
    root, directory = map(Path, sys.argv[1:3])
    prepare(directory)
    run_world(2, train, root, sys.argv[3])
