"""te_worker.py MODEL TE_DIRECTORY OUT RANKS ...: trains under the layouts of RANKS with our layers, and with
Transformer Engine's layers over tests/support/te_stub. Writes OUT/LAYOUT.pt with {provider: results}.

The ranks are forked from one process, which does the imports.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import te_stub

LAYOUTS = {
    1: ["tp=1"],
    2: ["tp=2", "tp=2,ep=2", "tp=2,etp=2", "cp=2"],
    4: ["tp=2,pp=2,ep=2", "tp=2,dp=2,ep=2", "tp=2,cp=2,ep=2"],
}
"""Layouts by number of ranks."""
FROZEN = ("router", "attention", "embedding")


def train(rank: int, ranks: int, model: Path, out: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    store = out / f"store-{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for text in LAYOUTS[ranks]:
        layout = Layout.resolve(*parse_layout(text))
        place = start_process_groups(layout, torch.device("cpu"), seed=0)
        answers: dict[str, Any] = {provider: answer(model, layout, place, provider) for provider in ("torch", "te")}
        theirs, ours = (answers[provider].pop("logprobs") for provider in ("torch", "te"))
        answers["logprobs_apart"] = largest([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)])
        if rank == 0:
            torch.save(answers, out / f"{text}.pt")
        stop_process_groups(leave_world=False)
    dist.destroy_process_group()


def fp8_recipes(arch: Any, layout: Any) -> dict[str, tuple[str, str]]:
    """Returns for each engine.fp8 Transformer Engine's recipe, as Megatron-Core makes it, and its format."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_rl.config.schema import EngineConfig
    from megatron_rl.engine.megatron_config import transformer_config

    found = {}
    for fp8 in ("tensorwise", "blockwise", "mxfp8"):
        config = transformer_config(arch, EngineConfig(fp8=fp8), layout, fused_kernels=True)
        recipe = get_fp8_recipe(config)
        found[fp8] = (type(recipe).__name__, recipe.fp8_format.name)
    return found


def largest(values: list[Any]) -> float:
    """Returns the largest value over all ranks; -1 if no rank has any."""
    import torch
    import torch.distributed as dist

    most = torch.stack([torch.tensor(-1.0), *values]).max()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def answer(model: Path, layout: Any, place: Any, provider: str) -> dict[str, Any]:
    """Returns log-probs, entropies, gradients, the gradient norms of two updates, and the weights after them.

    Also returns how far ranks with the same expert weights differ, which micro-batches have an attention plan, and the
    weights after two updates in which the kinds FROZEN do not train, under expert parallelism.
    """
    import numpy as np
    import torch

    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.data.packing import pack
    from megatron_rl.data.sample import Prompt, Sample
    from megatron_rl.engine.layers.attention_plan import PlannedSequences
    from megatron_rl.engine.policy import Policy

    rng = np.random.default_rng(place.dp)
    prompt = Prompt("", "", (3,), "", "")
    samples = [
        Sample.start(prompt, 0).extend(rng.integers(2, 40, n).tolist(), [0.0] * n, 0) for n in (17, 5, 30, 11, 24, 9)
    ]
    batches = [pack(samples[i : i + 3], [1.0] * 3, cp=layout.cp, tp=layout.tp) for i in (0, 3)]
    masks = [torch.as_tensor(batch.loss_mask) for batch in batches]

    def loss(index: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return -(logprobs * masks[index]).sum()

    engine = EngineConfig(device="cpu", dtype="fp32", layers=provider)  # type: ignore[arg-type]
    policy = Policy(model, layout, place, engine, torch.device("cpu"), None)
    policy.gradients(batches, loss)
    gradients = {name: g.clone() for part in policy.export(1 << 28, lambda p: p.main_grad) for name, g in part}  # type: ignore[attr-defined]
    policy = Policy(model, layout, place, engine, torch.device("cpu"), OptimConfig(lr=1e-3, eps=1e-4, clip_grad=10.0))
    partial = {}
    if layout.ep > 1:
        frozen = OptimConfig(lr=1e-3, eps=1e-4, clip_grad=10.0, weight_decay=0.1, freeze=FROZEN)  # type: ignore[arg-type]
        partly = Policy(model, layout, place, engine, torch.device("cpu"), frozen)
        partial = {
            "partial_norms": [partly.update(batches, loss).grad_norms for _ in range(2)],
            "partial_weights": {name: w.clone() for part in partly.export(1 << 28) for name, w in part},
        }
    logprobs = [value for pair in policy.logprobs(batches) for value in pair]
    updates = [policy.update(batches, loss) for _ in range(2)]
    return {
        "logprobs": logprobs,
        "gradients": gradients,
        "norms": [update.grad_norms for update in updates],
        "weights": {name: w.clone() for part in policy.export(1 << 28) for name, w in part},
        **partial,
        "fp8": fp8_recipes(policy.arch, layout),
        "copies_apart": copies_apart(policy),
        "fused": [m.fuse_wgrad_accumulation for m in policy.models[0].modules() if hasattr(m, "parallel_mode")],
        "attention_plans": [isinstance(batch.sequences, PlannedSequences) for batch in policy.micro_batches(batches)],
    }


def copies_apart(policy: Any) -> float:
    """Returns the largest difference between ranks that hold the same expert weights."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    group = parallel_state.get_expert_data_parallel_group()
    experts = torch.cat([p.data.flatten() for n, p in policy.models[0].named_parameters() if ".experts." in n])
    copies = [torch.empty_like(experts) for _ in range(group.size())]
    dist.all_gather(copies, experts, group=group)
    return largest([(copy - experts).abs().max() for copy in copies])


def main(model: Path, directory: Path, out: Path, worlds: list[int]) -> None:
    prepare(directory)
    for ranks in worlds:
        run_world(ranks, train, ranks, model, out)


def prepare(directory: Path) -> None:
    """Imports all that ranks need, with Transformer Engine from `directory`."""
    te_stub.load(directory)
    from megatron_rl.engine.device import use_device

    use_device("cpu")
    import megatron_rl.engine.policy  # noqa: F401

    te_stub.install_kernels()


def run_world(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs work(rank, *arguments) in `ranks` processes that are forked from this one."""
    context = multiprocessing.get_context("fork")
    world = [context.Process(target=work, args=(rank, *arguments)) for rank in range(ranks)]
    for process in world:
        process.start()
    waiting = {process.sentinel: process for process in world}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            ended = waiting.pop(sentinel)  # type: ignore[arg-type]
            ended.join()  # the sentinel may come before the exit status
            if ended.exitcode:
                for process in world:  # the others would wait for it
                    process.kill()
    if any(process.exitcode for process in world):
        sys.exit(f"the world of {ranks} failed")


if __name__ == "__main__":
    model, directory, out = map(Path, sys.argv[1:4])
    main(model, directory, out, [int(ranks) for ranks in sys.argv[4:]])
