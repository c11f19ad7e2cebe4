"""fake_cuda_worker.py MODEL: builds networks for a GPU on a machine without a GPU.

It prints JSON: for each network, the names of its weights by device; and NCCL's settings.

Tensors are torch's FakeTensors, which have a shape and a device but no values. So nothing is loaded or run, except a
router, whose first call fails without Transformer Engine under Megatron-Core 0.16.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.engine.device import NCCL_OF_SERVERS, use_device

GPU = torch.device("cuda", 0)


def pretend() -> None:
    torch.utils.swap_tensors = moved  # Module.to would refuse to swap FakeTensors, as other objects refer to them
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_device = lambda: GPU
    torch.cuda.Stream = lambda *args, **kwargs: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def moved(weight: torch.Tensor, there: torch.Tensor) -> None:
    weight.fake_device = there.device  # type: ignore[attr-defined]


class Built(Exception):
    """Raised once the network's stages are built, because the next steps need values."""


def main(model: Path) -> None:
    pretend()
    device = use_device("cuda")
    assert device == GPU
    from megatron.core.transformer.moe.router import TopKRouter

    import megatron_rl.engine.network as network
    from megatron_rl.engine.critic import Critic
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout("tp=1"))
    place = start_process_groups(layout, torch.device("cpu"), seed=0)  # of gloo
    engine = EngineConfig(device="cuda", layers="torch", dtype="bf16")

    @torch.no_grad()  # autograd would ask for CUDA
    def built(stages: list[torch.nn.Module], *_: Any) -> None:
        (stage,) = stages
        places: dict[str, list[str]] = {}
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            places.setdefault(str(tensor.device), []).append(name)
        for module in stage.modules():
            if isinstance(module, TopKRouter) and module.weight.device == GPU:
                module.gating(torch.empty(5, module.config.hidden_size, dtype=torch.bfloat16, device=GPU))
        raise Built(places)

    network.load_weights = built  # type: ignore[assignment]
    found = {}
    for name, build in {
        "policy": lambda: Policy(model, layout, place, engine, device, OptimConfig()),
        "without optimizer": lambda: Policy(model, layout, place, engine, device, None),
        "frozen": lambda: Policy(model, layout, place, engine, device, None, frozen=True),
        "critic": lambda: Critic(model, layout, place, engine, device, OptimConfig()),
    }.items():
        with FakeTensorMode():
            try:
                build()
            except Built as stages:
                (found[name],) = stages.args
    print(json.dumps({**found, "nccl": {name: os.environ[name] for name in NCCL_OF_SERVERS}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
