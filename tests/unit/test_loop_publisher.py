"""What the publisher does at each weight sync. Servers and transport are stand-ins."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import RolloutConfig, WeightsConfig
from megatron_rl.loop import publisher


def test_servers_are_checked_before_a_sync_and_only_its_version_counts_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    calls: list[Any] = []

    def push(version: int) -> dict[str, float]:
        calls.append(version)
        return {"seconds": 1.0}

    monkeypatch.setattr(publisher, "WeightSync", lambda *_, **__: SimpleNamespace(push=push))
    config: Any = SimpleNamespace(weights=WeightsConfig(), rollout=RolloutConfig(), seed=0)
    trainer: Any = SimpleNamespace(
        place=SimpleNamespace(rank=0),
        policy=None,
        run=SimpleNamespace(path=tmp_path),
        journal=SimpleNamespace(phase=lambda _: contextlib.nullcontext()),
    )
    servers: Any = SimpleNamespace(leader=None, check=lambda: calls.append("check"))
    made = publisher.Publisher(config, trainer, servers)
    assert made.versions == frozenset()
    for version in (3, 4):
        assert made.publish(version) == {"seconds": 1.0}
        assert made.versions == {version}
    assert calls == ["check", 3, "check", 4]
