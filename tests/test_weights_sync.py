"""Weight sync to a real server: its log-probs, checksums and version afterwards; and what a fault looks like."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rl_runs import environment, torchrun
from tiny_models import VOCAB_SIZE, make_tiny_model, reference_logprobs

from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server import Server, ServerOptions, free_ports

pytestmark = [pytest.mark.server, pytest.mark.distributed]
TOKENS = np.random.default_rng(3).integers(0, VOCAB_SIZE, 60).tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served architecture with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("trained") / "model", seed=1)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as one rank writes it into a directory."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    done = work(1, "export", trained, directory)
    assert done.returncode == 0, done.stderr[-9000:]
    return directory


@pytest.fixture(scope="module")
def fresh_checksum(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of another server, which was started with the exported model and never updated."""
    (port,) = free_ports(1)
    options = ServerOptions(model=exported, port=port, dtype="fp32", max_total_tokens=1024, threads=1)
    server = Server(options, tmp_path_factory.mktemp("logs") / "fresh.log")
    try:
        server.wait_ready(120.0)
        return str(ask(server, lambda c: c.weights_checksum()))
    finally:
        server.stop()


def work(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    worker = str(Path(__file__).parent / "sync_worker.py")
    return subprocess.run(
        torchrun(ranks, worker, *map(str, arguments)),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def push(
    trained: Path, server: Server, layout: str, route: str = "collective", mutation: str = "none"
) -> subprocess.CompletedProcess[str]:
    ranks = 4 if layout.count("=2") > 1 and "cp" not in layout else 2
    return work(ranks, "push", trained, server.url, layout, route, mutation)


def ask(server: Server, question: Callable[[SGLangClient], Any]) -> Any:
    async def run() -> Any:
        async with SGLangClient(server.url, deadline=60.0) as client:
            return await question(client)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def old_weights(tiny_model_dir: Path, tiny_server: Server, fresh_checksum: str) -> None:
    """Each test starts from a server with the first model's weights."""
    ask(tiny_server, lambda c: c.update_weights_from_disk(str(tiny_model_dir), weight_version=0))
    assert ask(tiny_server, lambda c: c.weights_checksum()) != fresh_checksum


@pytest.mark.parametrize(
    ("layout", "route"), [("tp=2", "collective"), ("pp=2", "disk"), ("tp=2,pp=2,ep=2", "collective")]
)
def test_a_sync_arrives(trained: Path, tiny_server: Server, fresh_checksum: str, layout: str, route: str) -> None:
    done = push(trained, tiny_server, layout, route)
    assert done.returncode == 0, done.stderr[-9000:]
    assert ask(tiny_server, lambda c: c.weights_checksum()) == fresh_checksum
    served = ask(tiny_server, lambda c: c.score(TOKENS))
    np.testing.assert_allclose(served, reference_logprobs(trained, TOKENS).numpy(), rtol=0, atol=1e-5)
    assert ask(tiny_server, lambda c: c.model_info())["weight_version"] == "7"


@pytest.mark.parametrize("mutation", ["swap", "skip"])
def test_a_faulty_sync_is_found(trained: Path, tiny_server: Server, fresh_checksum: str, mutation: str) -> None:
    done = push(trained, tiny_server, "ep=2", mutation=mutation)
    assert done.returncode != 0
    assert "log-probs of the probe differ from the trainer's" in done.stderr
    assert ask(tiny_server, lambda c: c.weights_checksum()) != fresh_checksum
