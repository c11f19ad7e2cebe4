"""What a network holds on each rank: counted in real tensors, and predicted."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("weights", "gradients", "optimizer")


def held(model: Path, text: str, dtype: str, critic: bool) -> dict[str, int]:
    """Returns this rank's bytes by kind after an optimizer step: of the storages of weights and gradients, and of the
    tensors that Adam and Megatron-Core's distributed optimizer keep."""
    network = _network(model, text, dtype, critic)
    from megatron_rl.engine.optimizer import optimizer_parts

    network.step(_batches(network.layout, 24), lambda _, output: output[:, 0].sum())
    weights: dict[int, int] = {}
    for module in network.models:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            weights[storage.data_ptr()] = storage.nbytes()
    gradients = {}
    for parameter in (p for module in network.models for p in module.parameters()):
        storage = parameter.main_grad.untyped_storage()
        gradients[storage.data_ptr()] = storage.nbytes()
    optimizer = 0
    for part in optimizer_parts(network.optimizer):
        if not part.is_stub_optimizer:
            masters = [p for group in part.optimizer.param_groups for p in group["params"]]
            moments = [x for state in part.optimizer.state.values() for x in state.values() if x.numel() > 1]
            own = [p for p in masters if p.untyped_storage().data_ptr() not in weights]
            optimizer += sum(tensor.nbytes for tensor in (*own, *moments))
    _leave()
    return {"weights": sum(weights.values()), "gradients": sum(gradients.values()), "optimizer": optimizer}


def predicted(model: Path, text: str, dtype: str, critic: bool) -> list[list[dict[str, int]]]:
    """Returns for each rank of the layout the bytes of a network that is built without values, and those counted in the
    list of weights."""
    import torch.distributed as dist

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.models.architecture import read_architecture
    from megatron_rl.planner.pretended import build, count_network, pretended_rank
    from megatron_rl.planner.shares import network_bytes

    dist.destroy_process_group()  # that of the test
    layout, engine = Layout.resolve(*parse_layout(text)), EngineConfig(dtype=dtype)  # type: ignore[arg-type]
    arch = read_architecture(model, critic)
    answers = []
    for rank in range(layout.world_size):
        with pretended_rank(layout, rank) as place:
            optim = OptimConfig()
            built = count_network(build(model, layout, place, engine, optim, value_head=critic), optim)
        item = 2 if dtype == "bf16" else 4
        counted = network_bytes(arch, layout, layout.coordinates(rank), item, optim=optim)
        answers.append([{kind: getattr(each, kind) for kind in KINDS} for each in (built, counted)])
    return answers


def devices(model: Path, text: str) -> set[str]:
    """Returns the devices of all that a built network holds: weights, gradients and optimizer."""
    import torch.distributed as dist

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.planner.pretended import build, pretended_rank

    dist.destroy_process_group()  # that of the test
    layout = Layout.resolve(*parse_layout(text))
    with pretended_rank(layout, layout.world_size - 1) as place:
        network = build(model, layout, place, EngineConfig(), OptimConfig())
    parameters = [p for module in network.models for p in module.parameters()]
    found = {tensor.device.type for p in parameters for tensor in (p, p.main_grad)}
    return found | {p.device.type for group in network.optimizer.param_groups for p in group["params"]}


def kept(model: Path, cases: Sequence[tuple[str, str]], tokens: int) -> list[tuple[Any, dict[int, int]]]:
    """Returns for each (recompute, dtype) the architecture, and the bytes that each layer's forward pass over one
    sequence keeps for the backward pass, without weights. One rank."""
    return [_kept(_network(model, "tp=1", dtype, False, recompute), tokens) for recompute, dtype in cases]


class _Forwarded(Exception):
    """Raised in place of the loss: the forward pass has ended."""


def _kept(network: Any, tokens: int) -> tuple[Any, dict[int, int]]:
    import torch

    from megatron_rl.engine.step import forward_backward

    weights = {p.untyped_storage()._cdata for module in network.models for p in module.parameters()}
    running: list[str] = []
    found: dict[int, tuple[Any, str]] = {}
    for name, module in network.models[0].named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: running.append(name))
        module.register_forward_hook(lambda module, inputs, output: running.__delitem__(-1))

    def keep(tensor: Any) -> Any:
        # Not by its address: a norm that is recomputed gives its output's memory to other tensors.
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            found.setdefault(storage, (tensor, running[-1] if running else ""))
        return tensor

    def stop(index: int, output: Any) -> Any:
        raise _Forwarded

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        micro_batches = network.micro_batches(_batches(network.layout, tokens))
        with contextlib.suppress(_Forwarded):
            forward_backward(network.stages, micro_batches, stop, None)
    layers: Counter[int] = Counter()
    for tensor, name in found.values():
        if layer := re.match(r"decoder\.layers\.(\d+)", name):
            layers[int(layer[1])] += tensor.untyped_storage().nbytes()
        elif name == "decoder" and tensor.dim() == 3:  # the input of a layer that is recomputed
            layers[-1] += tensor.untyped_storage().nbytes()
    _leave()
    return network.arch, dict(layers)


def _network(model: Path, text: str, dtype: str, critic: bool, recompute: str = "none") -> Any:
    from megatron_rl.engine.device import use_device

    device = use_device("cpu")
    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.engine.critic import Critic
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout(text))
    place = start_process_groups(layout, device, seed=0)
    engine: Any = {"device": "cpu", "dtype": dtype, "recompute": recompute}
    return (Critic if critic else Policy)(model, layout, place, EngineConfig(**engine), device, OptimConfig())


def _batches(layout: Any, tokens: int) -> list[Any]:
    import numpy as np

    from megatron_rl.data.packing import pack
    from megatron_rl.data.sample import Prompt, Sample

    ids = np.random.default_rng(0).integers(0, 40, tokens - 1).tolist()
    sample = Sample.start(Prompt("", "", (1,), "", ""), 0).extend(ids, [0.0] * len(ids), 0)
    return [pack([sample], [0.0], cp=layout.cp, tp=layout.tp)] * layout.micro_batch_multiple


def _leave() -> None:
    from megatron_rl.ranks.place import stop_process_groups

    stop_process_groups(leave_world=False)
