"""Optimizer steps of networks with other engine settings: one network after another, in one world of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from critic_samples import samples, weight_of
from pretended_apex import calls, pretended_apex
from pretended_host import pretended_host

SMALL_BUCKET = 1000
"""Parameters of a gradient bucket: the tiny models then have many, and the output layer one of its own, as real models
do."""


@dataclass(frozen=True)
class Case:
    layout: str = "tp=1"
    engine: tuple[tuple[str, Any], ...] = ()
    optim: tuple[tuple[str, Any], ...] = ()
    model: str = "model"
    critic: bool = False
    restores: bool = False
    """Before the last step, another network takes over from what a checkpoint holds."""
    host: bool = False
    """The machine is pretended to have a GPU, and a host beside it (pretended_host.py)."""
    token_multiple: int = 1
    apex: bool = False
    """Linear layers add weight gradients to DDP's buffers themselves (pretended_apex.py)."""


def main(root: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Returns for each case `norm` and `output` of each step, and on rank 0 `weights` after the second and the last.

    Of four steps the third is refused. `output` is the last stage's, of a forward pass after the step.
    """
    from megatron_rl.engine.device import use_device

    device = use_device("cpu")
    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.engine import network as network_module
    from megatron_rl.engine.data_parallel import ddp_config
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    def small_buckets(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(ddp_config(*args, **kwargs), bucket_size=SMALL_BUCKET)

    answers = []
    for case in cases:
        layout = Layout.resolve(*parse_layout(case.layout))
        layout = dataclasses.replace(layout, token_multiple=case.token_multiple)
        place = start_process_groups(layout, device, seed=0)
        host = pretended_host() if case.host else contextlib.nullcontext()
        apex = pretended_apex() if case.apex else contextlib.nullcontext()
        calls.clear()
        with mock.patch.object(network_module, "ddp_config", small_buckets), host, apex:
            answers.append(_train(case, root / case.model, layout, place, device))
        stop_process_groups(leave_world=False)
    return answers


def _train(case: Case, model: Path, layout: Any, place: Any, device: Any) -> dict[str, Any]:
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.engine.critic import Critic
    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.engine.network_state import network_state, network_tensors, restore_network
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.shard_file import ShardReader, write_tensors
    from megatron_rl.engine.step import forward

    engine = EngineConfig(**{"device": "cpu", "dtype": "fp32", **dict(case.engine)})
    optim = OptimConfig(**{"lr": 1e-3, "eps": 1e-4, "clip_grad": 1e12, **dict(case.optim)})

    def build() -> Any:
        return (Critic if case.critic else Policy)(model, layout, place, engine, device, optim)

    network = build()
    mine = [TrainSample(i, i, sample, 0.0) for i, sample in enumerate(samples()) if place.rank == 0]
    # As in a run, steps differ in how many micro-batches they have.
    batches = [distribute(mine, place, layout, mini_batches=1, max_tokens=most)[0] for most in (40, 80)]

    def loss(index: int, output: Any) -> Any:
        packed, outcomes = batch.micro_batches[index], batch.outcomes[index]
        weights = [weight_of(outcomes[n].index) * m for n, m in zip(packed.sequence_ids, packed.loss_mask, strict=True)]
        return (output[:, 0] * output.new_tensor(weights)).sum()

    def exported() -> dict[str, Any]:
        return {name: weight.clone() for bucket in network.export(1 << 28) for name, weight in bucket}

    def held() -> dict[str, Any]:
        return {name: tensor.detach().clone() for name, tensor in network_tensors(network, "it").items()}

    answer: dict[str, Any] = {"norm": [], "output": [], "weights": [], "first": held(), "on_host": _on_host(network)}
    for step in range(4):
        batch = batches[step % 2]
        if step == 3 and case.restores:
            with tempfile.TemporaryDirectory() as folder:
                file, state = Path(folder) / "rank", {"networks": {"it": network_state(network)}}
                write_tensors(file, network_tensors(network, "it"), state)
                network = build()
                restore_network(network, "it", [ShardReader(file)])
        routing = None if case.critic else network.routing_pass()  # counts how often routers run
        update = network.step(batch.micro_batches, loss, routing, approve=lambda _, step=step: step != 2)
        answer["norm"].append(update.grad_norm)
        if step in (1, 3):
            answer["weights"].append(exported())
        else:
            answer["output"].append(forward(network.stages, network.micro_batches(batch.micro_batches)))
    answer["deterministic"] = _torch().are_deterministic_algorithms_enabled()
    answer["held"] = held()
    answer["fused"] = len(calls)
    answer["overlaps"] = [getattr(each, "overlap_cpu_optimizer_d2h_h2d", None) for each in _optimizers(network)]
    answer["rows"] = [packed.tokens for each in batches for packed in each.micro_batches]
    answer["state_bytes"] = _state_bytes(network)
    answer["buckets"] = max(_buckets(stage) for stage in network.stages)
    return answer


def _buckets(stage: Any) -> int:
    return sum(len(group.buckets) for group in (*stage.bucket_groups, *stage.expert_parallel_bucket_groups))


def _on_host(network: Any) -> float:
    """Returns the part of the weights that the host steps."""
    inner = _optimizers(network)
    on_host = [each for optimizer in inner for each in getattr(optimizer, "cpu_optimizers", [])]
    return _elements(on_host) / _elements(inner)


def _state_bytes(network: Any) -> float:
    """Returns the bytes for each weight that an optimizer keeps of itself, wherever: its own weights among them, and
    gradients on the host."""
    inner = _optimizers(network)
    states = [tensor for optimizer in inner for state in optimizer.state.values() for tensor in state.values()]
    states += [tensor for optimizer in inner for tensor in getattr(optimizer, "cpu_copy_map_grad", {}).values()]
    return sum(tensor.nbytes for tensor in states if tensor.numel() > 1) / _elements(inner)


def _optimizers(network: Any) -> list[Any]:
    from megatron_rl.engine.optimizer import optimizer_parts

    return [part.optimizer for part in optimizer_parts(network.optimizer) if not part.is_stub_optimizer]


def _elements(optimizers: Sequence[Any]) -> int:
    return sum(p.numel() for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def _torch() -> Any:
    import torch

    return torch
