"""What the publisher does at each weight sync, and in which order. Servers and transport are stand-ins."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import RolloutConfig, WeightsConfig
from megatron_rl.loop import publisher
from megatron_rl.weights.collective import WeightSyncError


@pytest.mark.parametrize("lag", [0, 2])
def test_rollouts_that_go_on_are_paused_until_the_new_version_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, lag: int
) -> None:
    calls: list[Any] = []

    def note(what: str) -> Any:
        def noted(*version: int, tell: bool = True) -> dict[str, float]:
            assert tell
            calls.append((what, *version, [v for v in range(9) if v in made.versions]))
            return {what: 1.0}

        return noted

    sync = SimpleNamespace(push=note("push"), verify_if_due=note("verify"))
    monkeypatch.setattr(publisher, "WeightSync", lambda *_, **__: sync)
    monkeypatch.setattr(publisher, "together", lambda _: contextlib.nullcontext())  # there are no other ranks
    config: Any = SimpleNamespace(weights=WeightsConfig(), rollout=RolloutConfig(lag=lag), seed=0)
    trainer: Any = SimpleNamespace(
        place=SimpleNamespace(rank=0, control=None),
        policy=None,
        run=SimpleNamespace(path=tmp_path),
        journal=SimpleNamespace(phase=lambda _: contextlib.nullcontext()),
    )
    leader = SimpleNamespace(pause=note("pause"), resume=note("resume"))
    servers: Any = SimpleNamespace(leader=leader, check=note("check"))
    made = publisher.Publisher(config, trainer, servers)
    for version in (3, 4):
        assert made.publish(version) == {"push": 1.0, "verify": 1.0}
    before, after = ([3], [4]) if lag == 0 else ([1, 2, 3], [2, 3, 4])
    expected = [("check", before), ("pause", before), ("push", 4, before), ("resume", after), ("verify", 4, after)]
    assert calls[-len(calls) // 2 :] == [each for each in expected if lag or each[0] not in ("pause", "resume")]


def test_a_failed_sync_leaves_no_server_paused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """They may run elsewhere, for the next run too."""
    calls: list[str] = []

    def push(version: int) -> dict[str, float]:
        raise WeightSyncError("refused")

    monkeypatch.setattr(publisher, "WeightSync", lambda *_, **__: SimpleNamespace(push=push))
    monkeypatch.setattr(publisher, "together", lambda _: contextlib.nullcontext())  # there are no other ranks
    config: Any = SimpleNamespace(weights=WeightsConfig(), rollout=RolloutConfig(lag=1), seed=0)
    trainer: Any = SimpleNamespace(
        place=SimpleNamespace(rank=0, control=None),
        policy=None,
        run=SimpleNamespace(path=tmp_path),
        journal=SimpleNamespace(phase=lambda _: contextlib.nullcontext()),
    )
    leader = SimpleNamespace(pause=lambda tell: calls.append("pause"), resume=lambda tell: calls.append("resume"))
    servers: Any = SimpleNamespace(leader=leader, check=lambda: None)
    with pytest.raises(WeightSyncError, match="refused"):
        publisher.Publisher(config, trainer, servers).publish(1)
    assert calls == ["pause", "resume"]
