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
from megatron_rl.rollout.server import Server

pytestmark = [pytest.mark.server, pytest.mark.distributed]
TOKENS = np.random.default_rng(3).integers(0, VOCAB_SIZE, 60).tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served architecture with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("trained") / "model", seed=1)


def push(trained: Path, server: Server, layout: str, route: str = "collective", mutation: str = "none") -> Any:
    ranks = 4 if layout.count("=2") > 1 and "cp" not in layout else 2
    worker = str(Path(__file__).parent / "sync_worker.py")
    return subprocess.run(
        torchrun(ranks, worker, str(trained), server.url, layout, route, mutation),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def ask(server: Server, question: Callable[[SGLangClient], Any]) -> Any:
    async def run() -> Any:
        async with SGLangClient(server.url, deadline=60.0) as client:
            return await question(client)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def disk_checksum(trained: Path, tiny_server: Server) -> str:
    """Of the server once it has loaded the model from disk."""
    ask(tiny_server, lambda c: c.update_weights_from_disk(str(trained), weight_version=1))
    return str(ask(tiny_server, lambda c: c.weights_checksum()))


@pytest.fixture(autouse=True)
def old_weights(tiny_model_dir: Path, tiny_server: Server, disk_checksum: str) -> None:
    """Each test starts from a server with the first model's weights."""
    ask(tiny_server, lambda c: c.update_weights_from_disk(str(tiny_model_dir), weight_version=0))
    assert ask(tiny_server, lambda c: c.weights_checksum()) != disk_checksum


@pytest.mark.parametrize(
    ("layout", "route"), [("tp=2", "collective"), ("pp=2", "disk"), ("tp=2,pp=2,ep=2", "collective")]
)
def test_a_sync_arrives(trained: Path, tiny_server: Server, disk_checksum: str, layout: str, route: str) -> None:
    done = push(trained, tiny_server, layout, route)
    assert done.returncode == 0, done.stderr[-9000:]
    assert ask(tiny_server, lambda c: c.weights_checksum()) == disk_checksum
    served = ask(tiny_server, lambda c: c.score(TOKENS))
    np.testing.assert_allclose(served, reference_logprobs(trained, TOKENS).numpy(), atol=1e-5)
    assert ask(tiny_server, lambda c: c.model_info())["weight_version"] == "7"


@pytest.mark.parametrize("mutation", ["swap", "skip"])
def test_a_faulty_sync_is_found(trained: Path, tiny_server: Server, disk_checksum: str, mutation: str) -> None:
    done = push(trained, tiny_server, "ep=2", mutation=mutation)
    assert done.returncode != 0
    assert "log-probs of the probe differ from the trainer's" in done.stderr
    assert ask(tiny_server, lambda c: c.weights_checksum()) != disk_checksum
