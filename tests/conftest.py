"""Fixtures that several test files share: a small model directory, and one live server for the whole session."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sglang_forks
from hypothesis import settings

from megatron_rl.garbage import collect_rarely

# The process that only starts pytest's workers reads this file too, so torch is imported in the fixtures.
if TYPE_CHECKING:
    from forks import Forks

    from megatron_rl.rollout.server import Server

# A slow example on a busy machine is not a failure. `make test` draws the same examples every time, so that it fails
# for what was changed alone; `make test-all` takes the thorough profile, which draws others each time.
settings.register_profile("megatron_rl", parent=settings.default, deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", parent=settings.default, deadline=None, max_examples=500)
settings.load_profile("megatron_rl")

collect_rarely()

# A shell's background job ignores SIGINT, and so would the runs to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays: to visit it in search of cycles takes seconds


os.environ.setdefault(sglang_forks.VARIABLE, str(os.getpid()))  # pytest's workers inherit it

# Failed asserts in these files then show both sides, as in test files.
pytest.register_assert_rewrite("objective_checks", "resume_runs")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts ranks and command-line runs by forking, so that imports are done only once."""
    from forks import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def forked_ranks(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes parity and certify fork their ranks."""
    monkeypatch.setattr("megatron_rl.ranks.launch.run_ranks", forks.run_ranks)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Qwen3-MoE model with a character tokenizer. No layer is dense, as SGLang would give it experts."""
    from tiny_models import make_tiny_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def forked_servers() -> Iterator[None]:
    """Makes Server fork SGLang, so that its imports are done only once."""
    from megatron_rl.rollout import server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_start", sglang_forks.forking(server._start))
        yield


@pytest.fixture(scope="session")
def tiny_server(
    forked_servers: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A real SGLang server of the tiny model."""
    from megatron_rl.rollout.server import Server, ServerOptions, free_ports

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
    """URL of the server, reset to the weights of tiny_model_dir as weight version 0."""
    from megatron_rl.rollout.client import RefusedError, SGLangClient

    async def load() -> None:
        async with SGLangClient(tiny_server.url, deadline=60.0) as client, asyncio.timeout(30.0):
            while True:
                try:
                    return await client.update_weights_from_disk(str(tiny_model_dir), weight_version=0)
                except RefusedError as error:  # an aborted request of the test before ends with the next token
                    if "still running" not in str(error):
                        raise
                    await asyncio.sleep(0.05)

    asyncio.run(load())
    return tiny_server.url
