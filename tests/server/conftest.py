"""A real server that reports the experts of each token, for all files of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def routed_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts in all three layers, as SGLang would give a dense layer experts too."""
    from tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "routed", num_layers=3, experts_per_token=3)


@pytest.fixture(scope="session")
def routed_url(forked_servers: None, routed_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of its server, which has a weight version of the trainer's. Long prompts are prefilled in parts."""
    from megatron_rl.rollout.client import SGLangClient
    from megatron_rl.rollout.server import Server, ServerOptions, free_ports

    async def set_version(url: str) -> None:
        async with SGLangClient(url, deadline=60.0) as client:
            await client.update_weight_version(0)

    (port,) = free_ports(1)
    options = ServerOptions(
        model=routed_model_dir,
        port=port,
        dtype="fp32",
        max_total_tokens=4096,
        threads=1,
        return_routed_experts=True,
        extra_flags=("--chunked-prefill-size", "16"),
    )
    server = Server(options, tmp_path_factory.mktemp("logs") / "routed.log")
    try:
        server.wait_ready(120.0)
        asyncio.run(set_version(server.url))
        yield server.url
    finally:
        server.stop()
