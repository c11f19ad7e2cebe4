"""Fixtures that several test files share: a small model directory, and one live server for the whole session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from hypothesis import settings
from tiny_models import make_tiny_model

from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server import Server, ServerOptions, free_ports

# An example that takes long on a busy machine is no failure.
settings.register_profile("megatron_rl", parent=settings.default, deadline=None)
settings.load_profile("megatron_rl")

# Their asserts tell both sides, as those of a test file do.
pytest.register_assert_rewrite("objective_checks", "resume_runs")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts ranks and runs of the command line; pays once for what they import."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def forked_ranks(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that parity and certify start are forked."""
    monkeypatch.setattr("megatron_rl.ranks.launch.run_ranks", forks.run_ranks)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 Qwen3-MoE, grouped-query attention, character tokenizer. No dense layers: SGLang would give them experts."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real SGLang server of the tiny model."""
    (port,) = free_ports(1)
    options = ServerOptions(model=tiny_model_dir, port=port, dtype="fp32", max_total_tokens=8192, threads=1)
    server = Server(options, tmp_path_factory.mktemp("logs") / "server.log")
    try:
        server.wait_ready(120.0)
        yield server
    finally:
        server.stop()


@pytest.fixture
def served(tiny_server: Server, tiny_model_dir: Path) -> str:
    """URL of the server, with the weights of tiny_model_dir as version 0, whatever a test before left there."""

    async def load() -> None:
        async with SGLangClient(tiny_server.url, deadline=60.0) as client:
            await client.update_weights_from_disk(str(tiny_model_dir), weight_version=0)

    asyncio.run(load())
    return tiny_server.url
