"""Computes the router shift from model OLD to model NEW in every routing mode and layout.

Each rank writes its replica's samples as safetensors in OUT: [tokens] for MODE/LAYOUT/SAMPLE, and the shift from OLD to
OLD under same/...
"""

from __future__ import annotations

from pathlib import Path

from routing_worker import drifted_samples

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, RoutingConfig
from megatron_rl.engine.device import use_device

MODES = ("none", "r2", "r3")


def main(old: Path, new: Path, out: Path, layouts: list[str]) -> None:
    device = use_device("cpu")
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from megatron_rl.engine.distribute import MiniBatch, TrainSample, distribute
    from megatron_rl.engine.policy import Policy
    from megatron_rl.models.weights_io import ModelRanks, load_weights
    from megatron_rl.ranks.place import Place, start_process_groups, stop_process_groups
    from megatron_rl.routing.drift import RoutingStats
    from megatron_rl.routing.exchange import RouteExchange, valid_rows
    from megatron_rl.routing.modes import MiniBatchRouting
    from megatron_rl.routing.shift import RouterShift, packed_shift

    def load(policy: Policy, model: Path) -> None:
        place, layout = policy.place, policy.layout
        ranks = ModelRanks(place.tp, layout.tp, place.ep, layout.ep, place.etp, layout.etp)
        load_weights([stage.module for stage in policy.stages], policy.arch, model, ranks, policy.layers.weight_names)

    def shift(policy: Policy, batch: MiniBatch, mode: str, to: Path) -> list[torch.Tensor]:
        arch, place, layout = policy.arch, policy.place, policy.layout
        valid = [valid_rows(packed, layout, place, device) for packed in batch.micro_batches]
        shifts = RouterShift([len(rows) for rows in valid], device)
        stats = RoutingStats(arch.moe_layers, arch.num_experts, arch.experts_per_token, device)
        config = RoutingConfig(replay=mode)  # type: ignore[arg-type]
        routing = MiniBatchRouting(config, policy.routers, batch.routes, valid, stats, shifts)
        load(policy, old)
        policy.logprobs(batch.micro_batches, routing=routing.old_pass())
        load(policy, to)
        policy.logprobs(batch.micro_batches, routing=routing.shift_pass(shifts))
        return packed_shift(shifts.distances, batch.micro_batches, len(arch.moe_layers), layout, place)

    def by_sample(policy: Policy, batch: MiniBatch, mode: str, to: Path) -> dict[int, torch.Tensor]:
        found = {}
        for packed, whole in zip(batch.micro_batches, shift(policy, batch, mode, to), strict=True):
            for start, end in zip(packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True):
                real = int(packed.valid[start:end].sum())
                tokens = packed.token_ids[start : start + real].tolist()
                found[numbers[tuple(tokens)]] = whole[start : start + real].clone()
        return found

    found: dict[str, torch.Tensor] = {}
    place: Place
    for text in layouts:
        layout = Layout.resolve(*parse_layout(text))
        place = start_process_groups(layout, device, seed=0)
        policy = Policy(old, layout, place, EngineConfig(device="cpu", dtype="fp32"), device, optim=None)
        arch = policy.arch
        samples = drifted_samples(arch.vocab_size, arch.moe_layers, arch.num_experts, arch.experts_per_token)
        numbers = {tuple(sample.token_ids.tolist()): number for number, sample in enumerate(samples)}
        mine = [TrainSample(i, i, s, 1.0) for i, s in enumerate(samples)] if place.rank == 0 else []
        exchange = RouteExchange(arch, policy.routers.layers, place, layout)
        (batch,) = distribute(mine, place, layout, mini_batches=1, max_tokens=32, routes=exchange)
        for mode in MODES:
            for kind, to in (("", new), ("same/", old)):
                for number, values in by_sample(policy, batch, mode, to).items():
                    found[f"{kind}{mode}/{text}/{number}"] = values
        stop_process_groups(leave_world=False)
    save_file(found, out / f"rank-{place.rank}.safetensors")
    dist.barrier()
    stop_process_groups()
