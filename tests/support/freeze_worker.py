"""Optimizer steps with frozen weights: one network after another, in one world of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from critic_samples import samples, weight_of


@dataclass(frozen=True)
class Case:
    """A network, and the optimizer steps that it makes on the same batch."""

    layout: str = "tp=1"
    freeze: tuple[str, ...] = ()
    steps: int = 2
    clip: float = 0.5
    optim: tuple[tuple[str, float], ...] = (("lr", 1e-3), ("eps", 1e-4), ("weight_decay", 0.1))
    recompute: str = "none"
    dtype: str = "fp32"
    critic: bool = False
    model: str = "model"


def main(root: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Returns for each case: `weights` (on rank 0), `norm` and `norms` of each step, and this rank's `stored`.

    `stored` counts the elements with a gradient buffer, and those with optimizer state.
    """
    from megatron_rl.engine.device import use_device

    device = use_device("cpu")
    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    answers = []
    for case in cases:
        layout = Layout.resolve(*parse_layout(case.layout))
        place = start_process_groups(layout, device, seed=0)
        network = _network(root / case.model, case, layout, place, device)
        answers.append(_train(network, case))
        stop_process_groups(leave_world=False)
    return answers


def _network(model: Path, case: Case, layout: Any, place: Any, device: Any) -> Any:
    from megatron_rl.config.schema import EngineConfig, OptimConfig
    from megatron_rl.engine.critic import Critic
    from megatron_rl.engine.policy import Policy

    engine: Any = {"device": "cpu", "dtype": case.dtype, "recompute": case.recompute}
    optim: Any = {"freeze": case.freeze, "clip_grad": case.clip, **dict(case.optim)}
    cls = Critic if case.critic else Policy
    return cls(model, layout, place, EngineConfig(**engine), device, OptimConfig(**optim))


def _train(network: Any, case: Case) -> dict[str, Any]:
    from megatron_rl.engine.distribute import TrainSample, distribute

    mine = [TrainSample(i, i, sample, 0.0) for i, sample in enumerate(samples()) if network.place.rank == 0]
    (batch,) = distribute(mine, network.place, network.layout, mini_batches=1, max_tokens=40)

    def loss(index: int, output: Any) -> Any:
        """Returns the weighted sum of log-probs, or of values; `output` is [T, 2] or [T, 1]."""
        packed, outcomes = batch.micro_batches[index], batch.outcomes[index]
        weights = [weight_of(outcomes[n].index) * m for n, m in zip(packed.sequence_ids, packed.loss_mask, strict=True)]
        return (output[:, 0] * output.new_tensor(weights)).sum()

    updates = []
    for _ in range(case.steps):
        routing = None if case.critic else network.routing_pass()  # counts how often routers run
        updates.append(network.step(batch.micro_batches, loss, routing))
    return {
        "weights": {name: weight.clone() for bucket in network.export(1 << 28) for name, weight in bucket},
        "norm": [update.grad_norm for update in updates],
        "norms": [update.grad_norms for update in updates],
        "stored": _stored(network),
    }


def _stored(network: Any) -> tuple[int, int]:
    from megatron_rl.engine.optimizer import optimizer_parts

    parameters = [p for model in network.models for p in model.parameters()]
    buffers = sum(p.main_grad.numel() for p in parameters if hasattr(p, "main_grad"))
    parts = [part for part in optimizer_parts(network.optimizer) if not part.is_stub_optimizer]
    states = sum(state["exp_avg"].numel() for part in parts for state in part.optimizer.state.values())
    return buffers, states
