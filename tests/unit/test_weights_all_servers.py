"""Calls to all servers of a weight sync, some of which are gone."""

from __future__ import annotations

import contextlib

import pytest
from fault_proxy import Fault, FaultProxy

from megatron_rl.rollout import fleet
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.all_servers import AllServers


def test_servers_that_answer_are_told_from_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "REACH_SECONDS", 0.5)
    proxies = [FaultProxy("http://unused", always=fault) for fault in (Fault(status=200), Fault(delay=60.0))]
    with contextlib.closing(BackgroundLoop()) as loop:
        for proxy in proxies:
            loop.run(proxy.__aenter__())
        clients = [SGLangClient(proxy.url) for proxy in proxies]
        assert AllServers(clients, loop, 60.0).that_answer().urls == [proxies[0].url]
        for client, proxy in zip(clients, proxies, strict=True):
            loop.run(client.close())
            loop.run(proxy.__aexit__())
