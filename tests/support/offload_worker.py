"""Moves networks away and back on a pretended GPU, and trains on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from critic_samples import samples, weight_of
from pretended_gpu import _ON_HOST, pretended_gpu


def main(model: Path, dtype: Literal["bf16", "fp32"]) -> list[bool]:
    """Returns, of the networks that are moved and of those that stay: is all memory free, and is each step alike?"""
    from megatron_rl.engine.device import use_device

    device = use_device("cpu")
    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.engine.offload import Kind, offload, restore
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout("ep=2"))
    place = start_process_groups(layout, device, seed=0)
    engine, optim = EngineConfig(device="cpu", dtype=dtype), OptimConfig(lr=1e-2, freeze=("router",))
    moves, stays = (Policy(model, layout, place, engine, device, optim) for _ in range(2))
    reference = Policy(model, layout, place, engine, device, None, frozen=True)
    kinds: list[tuple[Policy, Kind]] = [
        (moves, "weights"),
        (reference, "weights"),
        (moves, "gradients"),
        (moves, "optimizer"),
    ]
    answers = []
    for _ in range(3):
        before = [p.detach().clone() for network in (moves, reference) for p in _parameters(network)]
        for call in (offload, restore):
            for network, kind in kinds if call is restore else reversed(kinds):
                with pretended_gpu(network):
                    call(network, kind)
            if call is offload:
                answers.append(all(map(_is_away, _tensors(moves) + _parameters(reference))))
        after = [p.detach() for network in (moves, reference) for p in _parameters(network)]
        answers.append(all(a.equal(b) for a, b in zip(before, after, strict=True)))
        answers.append(_step(moves, layout, place) == _step(stays, layout, place))
    held = zip(_tensors(moves), _tensors(stays), strict=True)
    return [*answers, all(a.equal(b) for a, b in held)]


def _parameters(network: Any) -> list[Any]:
    return [parameter for model in network.models for parameter in model.parameters()]


def _tensors(network: Any) -> list[Any]:
    from megatron_rl.engine.optimizer import optimizer_parts

    stages = [buffer for stage in network.stages for buffer in (*stage.buffers, *stage.expert_parallel_buffers)]
    optimizers = [part.optimizer for part in optimizer_parts(network.optimizer)]
    states = [t for each in optimizers for state in each.state.values() for t in state.values() if t.numel() > 1]
    stepped = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    return [*_parameters(network), *(buffer.grad_data for buffer in stages), *states, *stepped]


def _is_away(tensor: Any) -> bool:
    storage = tensor.untyped_storage()
    return storage.size() == 0 or storage.data_ptr() in _ON_HOST


def _step(network: Any, layout: Any, place: Any) -> float:
    from megatron_rl.engine.distribute import TrainSample, distribute

    mine = [TrainSample(i, i, sample, 0.0) for i, sample in enumerate(samples()) if place.rank == 0]
    (batch,) = distribute(mine, place, layout, mini_batches=1, max_tokens=80)

    def loss(index: int, output: Any) -> Any:
        packed, outcomes = batch.micro_batches[index], batch.outcomes[index]
        weights = [weight_of(outcomes[n].index) * m for n, m in zip(packed.sequence_ids, packed.loss_mask, strict=True)]
        return (output[:, 0] * output.new_tensor(weights)).sum()

    result: float = network.step(batch.micro_batches, loss).grad_norm
    return result
