"""Sends weights to a server by broadcast, through a proxy that fails calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fault_proxy import Fault, FaultProxy
from safetensors.torch import load_file

from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.all_servers import AllServers
from megatron_rl.weights.collective import CollectiveRoute

TIMEOUT = 120.0


def buckets(model: Path) -> list[list[tuple[str, torch.Tensor]]]:
    tensors = list(load_file(model / "model.safetensors").items())
    return [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]


@contextmanager
def route(url: str, *faults: Fault) -> Iterator[CollectiveRoute]:
    loop = BackgroundLoop()
    proxy = FaultProxy(url, *faults)
    loop.run(proxy.__aenter__())
    client = SGLangClient(proxy.url, deadline=TIMEOUT)
    made = CollectiveRoute(AllServers([client], loop, TIMEOUT), torch.device("cpu"))
    try:
        yield made
    finally:
        made.close()
        loop.run(client.close())
        loop.run(proxy.__aexit__())
        loop.close()


def stop_in_a_push(url: str, model: Path, at: str) -> None:
    """Pushes the model, and hangs before all weights have arrived; a wrong bucket is one that cannot be loaded."""

    def stop(*_: object, **__: object) -> None:
        print("there", flush=True)
        time.sleep(600)

    if at == "in the broadcast":
        torch.distributed.broadcast = stop
    sent = buckets(model)
    if at == "after a wrong bucket":
        sent[0] = [(name, tensor[:-2]) for name, tensor in sent[0]]
    with route(url) as route_:
        if at == "between begin and end":
            route_._send = stop  # type: ignore[assignment,method-assign]
        if at.startswith("after"):
            sent = itertools.chain(sent[:1], iter(stop, None))  # type: ignore[assignment]
        route_.push(sent, 7)
