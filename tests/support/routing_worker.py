"""Log-probs and gradients under drifted routes, and under the routes of a forward pass of the same model; rank 0 writes
them as safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.engine.device import use_device

LENGTHS = (9, 14, 23, 11)


def drifted_samples(vocab_size: int, layers: tuple[int, ...], num_experts: int, top_k: int) -> list[Sample]:
    """Returns samples, equal in every process. Rows are missing at the end, and in sample 2 also in the middle."""
    rng = np.random.default_rng(7)
    samples = []
    for number, length in enumerate(LENGTHS):
        tokens = rng.integers(2, vocab_size, length).tolist()
        ids = rng.permuted(np.tile(np.arange(num_experts), (length - 1, len(layers), 1)), axis=-1)[..., :top_k]
        if number == 1:
            ids[5:8] = -1
        trace = RoutingTrace.from_ids(
            ids, layers=layers, num_experts=num_experts, source="rollout", versions=(VersionSpan(0, 0, length - 1),)
        )
        sample = Sample.start(Prompt(str(number), "", tuple(tokens[:2]), "", ""), 0)
        samples.append(sample.extend(tokens[2:], [-1.0] * (length - 2), 0).with_trace(trace))
    return samples


def main(model: Path, text: str, recompute: str, out: Path) -> None:
    device = use_device("cpu")
    import torch
    from safetensors.torch import save_file

    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups
    from megatron_rl.routing.exchange import RouteExchange
    from megatron_rl.routing.slicing import RankRoutes

    layout = Layout.resolve(*parse_layout(text))
    place = start_process_groups(layout, device, seed=0)
    engine = EngineConfig(device="cpu", dtype="fp32", recompute=recompute)
    policy = Policy(model, layout, place, engine, device, optim=None)
    arch = policy.arch
    moe = arch.moe_layers
    samples = drifted_samples(arch.vocab_size, moe, arch.num_experts, arch.experts_per_token)
    mine = [TrainSample(i, i, s, 1.0) for i, s in enumerate(samples)] if place.rank == 0 else []
    exchange = RouteExchange(arch, policy.routers.layers, place, layout)
    (batch,) = distribute(mine, place, layout, mini_batches=1, max_tokens=32, routes=exchange)
    masks = [torch.as_tensor(packed.loss_mask) for packed in batch.micro_batches]
    seen: list[torch.Tensor] = [torch.zeros(0)] * len(masks)

    def loss(index: int, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        seen[index] = logprobs.detach()
        return -(logprobs * masks[index]).sum()

    policy.gradients(batch.micro_batches, loss, policy.routing_pass(batch.routes))
    found = {f"grad/{name}": g for part in policy.export(1 << 28, lambda p: p.main_grad) for name, g in part}  # type: ignore[attr-defined]

    # Routes of a forward pass of this model, and its log-probs if they are replayed.
    first = policy.routing_pass(record=True)
    live = policy.logprobs(batch.micro_batches, routing=first)
    own = [RankRoutes(ids, torch.ones(len(ids), dtype=torch.bool)) for ids in first.live]
    again = policy.logprobs(batch.micro_batches, routing=policy.routing_pass(own))
    pairs = ((a, b) for one, other in zip(live, again, strict=True) for a, b in zip(one, other, strict=True))
    same = all(torch.equal(a, b) for a, b in pairs)
    differs = any(not torch.equal(a, b) for (a, _), b in zip(live, seen, strict=False))
    bits = torch.tensor([same, differs or not live])
    torch.distributed.all_reduce(bits, op=torch.distributed.ReduceOp.MIN, group=place.control)
    if place.rank == 0:
        save_file({**{k: v.contiguous() for k, v in found.items()}, "bits": bits}, out)
    stop_process_groups()
