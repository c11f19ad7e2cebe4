"""Computes the critic's values and gradients under each layout in turn.

Rank 0 writes OUT/LAYOUT.safetensors, and under the last layout the exported critic as OUT/critic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from critic_samples import samples, weight_of

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.device import use_device


def main(model: Path, out: Path, layouts: list[str]) -> None:
    device = use_device("cpu")
    import orjson
    import torch
    from safetensors.torch import save_file

    from megatron_rl.engine.critic import Critic
    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.models.weights_io import save_weights
    from megatron_rl.ranks.collectives import all_gather_bytes
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    for text in layouts:
        layout = Layout.resolve(*parse_layout(text))
        place = start_process_groups(layout, device, seed=0)
        critic = Critic(model, layout, place, EngineConfig(device="cpu", dtype="fp32"), device, None)
        mine = [TrainSample(i, i, sample, 0.0) for i, sample in enumerate(samples()) if place.rank == 0]
        (batch,) = distribute(mine, place, layout, mini_batches=1, max_tokens=40)
        rows = []
        for packed, outcomes, values in zip(
            batch.micro_batches, batch.outcomes, critic.values(batch.micro_batches) or [], strict=False
        ):
            for number, outcome in enumerate(outcomes):
                at = packed.loss_mask & (packed.sequence_ids == number)
                rows.append([outcome.index, values.numpy()[at].tolist()])
        found = dict(row for part in all_gather_bytes(orjson.dumps(rows), place.control) for row in orjson.loads(part))

        def loss(index: int, values: torch.Tensor) -> torch.Tensor:
            packed, outcomes = batch.micro_batches[index], batch.outcomes[index]  # noqa: B023
            weights = np.array([weight_of(outcomes[number].index) for number in packed.sequence_ids])
            return (values * torch.as_tensor(weights * packed.loss_mask)).sum().float()

        critic.accumulate(batch.micro_batches, lambda index, output: loss(index, output[:, 0]))
        gradients = {name: g for part in critic.export(1 << 28, lambda p: p.main_grad) for name, g in part}  # type: ignore[attr-defined]
        exported = [pair for part in critic.export(1 << 28) for pair in part]
        if place.rank == 0:
            numbers = {f"value/{index}": torch.tensor(row) for index, row in found.items()}
            save_file({**numbers, **{k: v.contiguous() for k, v in gradients.items()}}, out / f"{text}.safetensors")
            if text == layouts[-1]:
                save_weights(exported, out / "critic", model, 1 << 30, torch.float32, value_head=True)
        stop_process_groups(leave_world=False)
    stop_process_groups()
