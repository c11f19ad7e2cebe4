"""Four ranks that read examples from a port, one after another, and answer each.

A question is a rank_examples.Example in JSON. Its answer has the losses, gradients by token and metrics of each
mini-batch in every layout. Policies are tables from token ids to log-probs, and every token has a unique id. Looking up
a rank's labels replaces the forward pass, and the table's gradient, summed over ranks, the parameters' gradients.
Everything between is the trainer's own code: with_advantages, distribute, the context-parallel slices and their gather,
prepare, the losses, and reduce_metrics.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from rank_examples import TOP_K, WEIGHT_VERSION, Example

LAYOUTS = ("dp=4", "dp=2,cp=2", "cp=4", "tp=2,pp=2")
WORLD = 4


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack("<Q", len(data)) + data)


def receive(connection: socket.socket) -> bytes:
    """Returns the next message, or b"" if the other side has closed the connection."""

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            parts.append(connection.recv(min(count, 1 << 20)))
            if not parts[-1]:
                return b""
            count -= len(parts[-1])
        return b"".join(parts)

    header = exactly(8)
    return exactly(struct.unpack("<Q", header)[0]) if header else b""


def serve(port: int) -> None:
    import orjson
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.ranks.collectives import broadcast_bytes
    from megatron_rl.ranks.place import Place, start_process_groups, stop_process_groups

    device, rank = torch.device("cpu"), dist.get_rank()
    settings = {}
    for text in LAYOUTS:
        layout = Layout.resolve(*parse_layout(text))
        place = start_process_groups(layout, device, seed=0)
        settings[text] = Setting(layout, place, parallel_state.get_context_parallel_group())
        parallel_state.destroy_model_parallel()  # forgets the groups without destroying them
    world = settings[LAYOUTS[0]].place.control
    mine = dist.new_group([0], backend="gloo")
    if rank == 0:
        place = Place(rank=0, tp=0, pp=0, cp=0, dp=0, ep=0, etp=0, edp=0, control=mine, replica=mine)
        settings["alone"] = Setting(Layout.resolve(*parse_layout("dp=1")), place, mine)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            connection = stack.enter_context(socket.create_connection(("localhost", port)))
        while question := broadcast_bytes(receive(connection) if rank == 0 else None, world):
            example = Example.from_json(question)
            answer = {}
            if rank == 0:
                answer["whole"] = answered(example, settings["alone"], whole=True)
                answer["alone"] = answered(example, settings["alone"])
            answer |= {text: answered(example, settings[text]) for text in LAYOUTS}
            if rank == 0:
                send(connection, orjson.dumps(answer))
    stop_process_groups()


@dataclass(frozen=True)
class Setting:
    """A layout, this rank's place in it and its context-parallel group."""

    layout: Any
    place: Any
    context: Any


def answered(example: Example, setting: Setting, whole: bool = False) -> list[dict[str, Any]]:
    """Answers an example; collective over the layout.

    With `whole`, each mini-batch is one micro-batch with samples in order. Else the example's budget and order apply.
    """
    with mock.patch("megatron.core.parallel_state.get_context_parallel_group", return_value=setting.context):
        return _answered(example, setting, whole)


def _answered(example: Example, setting: Setting, whole: bool) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    from megatron_rl.engine.distribute import distribute
    from megatron_rl.engine.top_exchange import TopExchange
    from megatron_rl.lab.journal import reduce_metrics
    from megatron_rl.lab.metrics import explained_variance
    from megatron_rl.loop.experience import prepare
    from megatron_rl.train import with_advantages

    layout, place = setting.layout, setting.place
    config = example.config()
    groups = example.groups() if whole else example.groups(shuffled=True, leader=place.dp, leaders=layout.dp)
    centred = config.objective.centering is not None
    mini_batches = distribute(
        with_advantages(groups if place.leads_replica else [], config),
        place,
        layout,
        mini_batches=example.mini_batches,
        max_tokens=1 << 30 if whole else example.max_tokens,
        tops=TopExchange(TOP_K, place, layout) if centred else None,
    )
    for packed in (packed for mini_batch in mini_batches for packed in mini_batch.micro_batches):
        needed = centred and place.pp == layout.pp - 1 and not packed.is_empty
        assert (packed.top is not None) == needed, "top tokens are where the loss is, and nowhere else"
    old, reference, values = (Table(example.tables[name], setting) for name in ("old", "reference", "old_values"))
    trainer = SimpleNamespace(
        place=place,
        policy=SimpleNamespace(
            logprobs=old.with_entropy,
            is_last_stage=old.is_last_stage,
            device=torch.device("cpu"),
            arch=SimpleNamespace(num_experts=0),
        ),
        reference=SimpleNamespace(logprobs=reference.with_entropy) if config.objective.kl.kind != "none" else None,
        critic=SimpleNamespace(values=values.of_all) if config.critic else None,
        journal=SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
    )

    def step(mini_batch: Any, loss: Any, table: str, columns: bool) -> dict[str, Any]:
        """Does the work of Network.step without a network: the loss's gradient, and sums (not means) over ranks."""
        live = Table(example.tables[table], setting, example.tops["theta"] if columns and centred else None)
        total = torch.zeros((), dtype=torch.float64)
        if live.is_last_stage:
            for index, packed in enumerate(mini_batch.micro_batches):
                if packed.is_empty:  # as in engine.step
                    continue
                output = live.of(packed)
                top = (output[:, 1:],) if columns and centred else ()
                share = loss(index, output[:, 0], entropy_of(output), *top) if columns else loss(index, output[:, 0])
                assert share.dtype == torch.float64
                share.backward()
                total += share.detach()
        counted = live.is_last_stage and place.tp == 0  # tensor-parallel ranks have the same gradient
        gradient = live.gradient() * counted
        dist.all_reduce(gradient, group=place.control)
        total *= counted and place.cp == 0
        dist.all_reduce(total, group=place.control)
        metrics = reduce_metrics(loss.metrics, place, holds_samples=live.is_last_stage)
        answer = {"loss": float(total), "gradient": gradient.tolist(), "metrics": metrics}
        if live.top is not None:
            answer["top_gradient"] = live.top_gradient(counted).tolist()
        return answer

    answers = []
    for update in prepare(config, trainer, mini_batches, weight_version=WEIGHT_VERSION, measures_noise=False):  # type: ignore[arg-type]
        answers.append({"policy": step(update.mini_batch, update.loss, "theta", True)})
        if update.value_loss is not None:
            answers[-1]["critic"] = step(update.mini_batch, update.value_loss, "values", False)
            answers[-1]["critic"]["metrics"] |= explained_variance(answers[-1]["critic"]["metrics"])
    return answers


def entropy_of(output: Any) -> Any:
    """Makes up an entropy that differs for every token."""
    return output[:, 0].detach().square()


class Table:
    """A network that looks up a number for each label. Tokens outside the loss mask have NaN.

    With `top`, rows by label, it also looks up the row's numbers of the packed batch's top tokens.
    """

    def __init__(self, values: list[float | None], setting: Setting, top: list[list[Any]] | None = None) -> None:
        import numpy as np
        import torch

        self.top = None if top is None else torch.tensor(np.array(top, dtype=np.float64), requires_grad=True)
        self._leaf = torch.tensor(np.array(values, dtype=np.float64), requires_grad=True)
        self._setting = setting
        self.is_last_stage = setting.place.pp == setting.layout.pp - 1

    def of(self, packed: Any) -> Any:
        """Returns [T, 1], or [T, 1 + k], like the last stage: this rank's slice, gathered over context parallelism."""
        import torch

        from megatron_rl.engine.layers.plain_torch import TorchLayers
        from megatron_rl.engine.micro_batch import micro_batch
        from megatron_rl.engine.step import _whole

        place, layout = self._setting.place, self._setting.layout
        top = self.top
        batch = micro_batch(packed, layout.cp, place.cp, self._leaf.device, TorchLayers(), top is not None)
        output = self._leaf[batch.labels[0]][:, None]
        if top is not None:
            output = torch.cat([output, top[batch.labels[0]].gather(1, batch.labels[1:].t())], dim=1)
        return _whole(output, batch)

    def of_all(self, batches: Any) -> list[Any]:
        return [self.of(packed)[:, 0].detach() for packed in batches] if self.is_last_stage else []

    def with_entropy(self, batches: Any, routing: None = None) -> list[tuple[Any, Any]]:
        return [(values, values.square()) for values in self.of_all(batches)]

    def gradient(self) -> Any:
        return self._leaf.new_zeros(len(self._leaf)) if self._leaf.grad is None else self._leaf.grad

    def top_gradient(self, counted: bool) -> Any:
        """Returns the gradient of `top`, summed over ranks; `counted` is as for the other gradient. Collective."""
        import torch.distributed as dist

        assert self.top is not None
        found = self.top.new_zeros(self.top.shape) if self.top.grad is None else self.top.grad
        found = found * counted
        dist.all_reduce(found, group=self._setting.place.control)
        return found
