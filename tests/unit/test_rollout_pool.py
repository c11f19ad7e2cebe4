"""The servers that a run starts, or keeps from the last run. A stand-in takes the place of SGLang's processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

from megatron_rl.config.schema import EngineConfig, RolloutConfig
from megatron_rl.rollout import pool
from megatron_rl.rollout.kept_pool import KeptPool
from megatron_rl.rollout.pool import Pool, PoolOptions
from megatron_rl.rollout.server import ServerError, ServerOptions


class Started:
    """A server that only remembers how it was started. The one with number `failing` does not come up."""

    every: list[Started]
    failing: int | None = None

    def __init__(self, options: ServerOptions, log: Path) -> None:
        self.options, self.log, self.stopped = options, log, False
        self.every.append(self)

    def wait_ready(self, seconds: float) -> None:
        if self.every.index(self) == self.failing:
            raise ServerError("did not come up")

    def check_alive(self) -> None:
        if self.stopped:
            raise ServerError("has died")

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    every: list[Started] = []
    monkeypatch.setattr(Started, "every", every, raising=False)
    monkeypatch.setattr(pool, "Server", Started)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return every


@pytest.fixture
def options(tmp_path: Path) -> PoolOptions:
    return PoolOptions(
        rollout=RolloutConfig.model_validate(
            {"prompts_per_step": 1, "max_response_tokens": 7, "servers": {"launch": 3, "tp": 2}}
        ),
        engine=EngineConfig(device="cpu", dtype="bf16"),
        model=make_tiny_model(tmp_path / "model", num_layers=1),
        logs=tmp_path / "logs",
        seed=40,
    )


def launched(monkeypatch: pytest.MonkeyPatch, size: int, local: int) -> None:
    """Sets what torchrun tells rank 0 of a world of `size` ranks, `local` of them on this machine."""
    variables = {"RANK": 0, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local}
    for name, value in {**variables, "MASTER_ADDR": "head.cluster", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


def test_each_server_has_its_own_seed_port_log_and_gpus(
    started: list[Started], options: PoolOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of this machine have the first GPUs."""
    launched(monkeypatch, size=4, local=4)
    with Pool(options):
        pass
    assert [each.options.seed for each in started] == [40, 41, 42]
    assert [each.options.first_gpu for each in started] == [4, 6, 8]
    assert len({each.options.port for each in started}) == len({each.log for each in started}) == 3
    assert {each.options.api_key for each in started} != {None}
    assert all(each.stopped for each in started)


def test_servers_listen_for_leaders_on_other_machines_if_there_are_any(
    started: list[Started], options: PoolOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, host in ((4, "127.0.0.1"), (8, "head.cluster")):
        launched(monkeypatch, size, local=4)
        with Pool(options):
            assert {each.options.host for each in started if not each.stopped} == {host}


def test_a_server_that_does_not_come_up_ends_the_others(
    started: list[Started], options: PoolOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Started, "failing", 1)
    with pytest.raises(ServerError, match="did not come up"), Pool(options):
        pass
    assert [each.stopped for each in started] == [True] * 3


@pytest.mark.parametrize("changed", ["nothing", "seed", "routes", "flags", "dtype", "model", "a dead server"])
def test_servers_are_kept_if_they_would_be_started_alike(
    started: list[Started], options: PoolOptions, tmp_path: Path, changed: str
) -> None:
    servers = options.rollout.servers.model_copy(update={"extra_flags": ("--x",)})
    updates: dict[str, dict[str, Any]] = {
        "seed": {"seed": 41},
        "routes": {"return_routed_experts": True},
        "flags": {"rollout": options.rollout.model_copy(update={"servers": servers})},
        "dtype": {"engine": EngineConfig(device="cpu", dtype="fp32")},
    }
    kept = KeptPool(tmp_path / "kept")
    with kept.open(options):
        assert len(started) == 3
    if changed == "model":
        make_tiny_model(options.model, num_layers=1, seed=1)
    if changed == "a dead server":
        started[1].stop()
    with kept.open(dataclasses.replace(options, **updates.get(changed, {}))):
        assert len(started) == (3 if changed in ("nothing", "seed") else 6)
        assert [each.stopped for each in started[-3:]] == [False] * 3
    kept.close()
    assert all(each.stopped for each in started)
