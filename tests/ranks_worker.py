"""torchrun ... ranks_worker.py PORT: losses, gradients and metrics of batches that the test sends, under each layout.

No model: log-probs and values come from tables, by sample and token. All that lies between them and the optimizer is
the trainer's own: the plan, the packing, context parallelism's gather, advantages, denominators, losses and metrics.

Rank 0 talks to the test over a local socket, in length-prefixed JSON.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import ObjectiveConfig, ParallelConfig
from megatron_rl.data.sample import Prompt, Sample, Verdict
from megatron_rl.engine.device import use_device

LAYOUTS = {"one rank": (1, 1), "dp4": (4, 1), "dp2 cp2": (2, 2), "cp4": (1, 4)}
"""(data parallelism, context parallelism); all but the first use the whole world of four."""


def send(connection: socket.socket, message: Any) -> None:
    data = orjson.dumps(message)
    connection.sendall(len(data).to_bytes(8, "little") + data)


def receive(connection: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = connection.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    return orjson.loads(exactly(int.from_bytes(exactly(8), "little")))


def as_sample(record: dict[str, Any]) -> Sample:
    """From a response's turns: the policy's and, between them, observations."""
    sample = Sample.start(Prompt(str(record["index"]), "", tuple(record["prompt"]), "", ""), record["index"])
    for turn, (tokens, logprobs) in enumerate(zip(record["turns"], record["mu"], strict=True)):
        sample = sample.extend(tokens, logprobs if turn % 2 == 0 else None, 0)
    return dataclasses.replace(sample, verdict=Verdict(record["reward"], record["reward"] > 0))


class Tables:
    """By sample, [n]: what a policy or critic says at the position that predicts each token; NaN outside the mask."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._rows = {record["index"]: record["tables"] for record in records}

    def packed(self, name: str, batch: Any, outcomes: Any) -> np.ndarray:
        found = np.full(batch.tokens, np.nan)
        for position in np.flatnonzero(batch.loss_mask):
            index = outcomes[batch.sequence_ids[position]].index
            found[position] = self._rows[index][name][batch.position_ids[position]]
        return found


def run(example: dict[str, Any], layout: Layout, place: Any, cp_group: Any) -> list[dict[str, Any]]:
    import torch

    from megatron_rl.engine.batch import micro_batch
    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.engine.exchange import all_gather_bytes
    from megatron_rl.engine.losses import PolicyLoss, without_rejected
    from megatron_rl.engine.step import _GatherContext
    from megatron_rl.trainer import Trainer

    objective = ObjectiveConfig.model_validate(example["objective"])
    tables, device = Tables(example["samples"]), torch.device("cpu")
    mine = [
        TrainSample(record["index"], record["group"], as_sample(record), record["advantage"])
        for record in example["samples"]
        if place.leads_replica and record["group"] % layout.dp == place.dp
    ]
    mini_batches = distribute(
        mine, place, layout, mini_batches=example["mini_batches"], max_tokens=example["max_tokens"]
    )

    def of(name: str) -> list[list[torch.Tensor]]:
        return [
            [torch.tensor(tables.packed(name, *pair)) for pair in zip(b.micro_batches, b.outcomes, strict=True)]
            for b in mini_batches
        ]

    old, reference, shift = of("old"), of("reference"), of("shift")
    mini_batches = with_late_advantages(objective, mini_batches, old, reference, of("value"), place)
    results = []
    for number, batch in enumerate(mini_batches):
        batch = without_rejected(batch, objective, old[number], place)
        loss = PolicyLoss(objective, batch, old[number], device, reference_logprobs=reference[number])
        if objective.router_shift is not None:
            loss.router_shift = shift[number]
        total, gradients = 0.0, []
        for k, (packed, outcomes) in enumerate(zip(batch.micro_batches, batch.outcomes, strict=True)):
            here = micro_batch(packed, layout.cp, place.cp, device)
            rows = np.split(np.argsort(here.gather_order.numpy()), layout.cp)[place.cp]  # this rank's positions
            leaf = torch.tensor(tables.packed("theta", packed, outcomes)[rows]).requires_grad_()
            whole = leaf[:, None]
            if layout.cp > 1:
                whole = _GatherContext.apply(whole, cp_group).index_select(0, here.gather_order)
            value = loss(k, whole[:, 0], torch.zeros(packed.tokens))
            value.backward()
            total += value.item() if place.cp == 0 else 0.0
            for position, gradient in zip(rows, leaf.grad.tolist(), strict=True):
                if packed.loss_mask[position]:
                    token = int(packed.position_ids[position])
                    gradients.append([outcomes[packed.sequence_ids[position]].index, token, gradient])
        metrics = Trainer.reduce(SimpleNamespace(place=place), loss.metrics, holds_samples=True)
        parts = all_gather_bytes(orjson.dumps([total, gradients]), place.control)
        everyone = [orjson.loads(part) for part in parts]
        results.append(
            {
                "loss": sum(part[0] for part in everyone),
                "gradients": sorted(row for part in everyone for row in part[1]),
                "metrics": metrics,
                "denominators": [batch.denominators.tokens, batch.denominators.sequences],
            }
        )
    return results


def with_late_advantages(
    objective: ObjectiveConfig, mini_batches: Any, old: Any, reference: Any, values: Any, place: Any
) -> Any:
    """As megatron_rl.experience.prepare."""
    from megatron_rl.engine.advantages import gae_finish, group_finish, kl_penalties, wait_for_policies
    from megatron_rl.objectives.kl import in_reward

    if not wait_for_policies(objective):
        return mini_batches
    penalties = None
    if in_reward(objective):
        penalties = [kl_penalties(objective, *pair) for pair in zip(old, reference, strict=True)]
    if objective.advantage.estimator == "gae":
        return gae_finish(mini_batches, values, penalties, objective.advantage, place)[0]
    return group_finish(mini_batches, penalties, objective.advantage, place)


def places(rank: int) -> dict[str, Any]:
    """By layout: (layout, this rank's place, its context-parallel group), or None where it takes no part. In
    Megatron-Core's rank order context parallelism is faster than data parallelism."""
    import torch.distributed as dist

    from megatron_rl.engine.parallel import Place

    alone = [dist.new_group([r]) for r in range(4)]
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world = dist.group.WORLD
    found: dict[str, Any] = {}
    for name, (dp, cp) in LAYOUTS.items():
        layout = Layout.resolve(ParallelConfig(cp=cp), dp * cp)
        if name == "one rank" and rank:
            found[name] = None
            continue
        replica = {1: alone[rank], 2: pairs[rank // 2], 4: world}[cp]
        control = alone[0] if name == "one rank" else world
        place = Place(
            rank=rank,
            tp=0,
            pp=0,
            cp=rank % cp,
            dp=rank // cp,
            ep=0,
            etp=0,
            control=control,
            replica=replica,
        )
        found[name] = (layout, place, replica)
    return found


def main(port: int) -> None:
    use_device("cpu")
    import torch.distributed as dist

    from megatron_rl.data.schedule import ScheduleError
    from megatron_rl.engine.exchange import broadcast_bytes

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    known = places(rank)
    connection = socket.create_connection(("127.0.0.1", port)) if rank == 0 else None
    while True:
        asked = b""
        if connection is not None:
            try:
                asked = orjson.dumps(receive(connection))
            except EOFError:
                asked = b"null"
        request = orjson.loads(broadcast_bytes(asked, dist.group.WORLD))
        if request is None:
            break
        here = known[request["layout"]]
        answer: Any = None
        if here is not None:
            try:
                answer = run(request["example"], *here)
            except ScheduleError as error:  # on every rank alike
                answer = {"error": str(error)}
        if connection is not None:
            send(connection, answer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
