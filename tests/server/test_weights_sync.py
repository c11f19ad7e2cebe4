"""Weight sync to a real server: log-probs, checksum and weight version afterwards, and how faults are detected."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Forks, Run
from paths import SUPPORT
from stress_reference import copy_changed, e4m3_numbers, integers, rounded
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
def exported(forks: Forks, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as one rank writes it into a directory."""
    directory = tmp_path_factory.mktemp("exported") / "model"
    done = forks.run(SUPPORT / "sync_worker.py", "export", trained, directory)
    assert done.returncode == 0, done.stderr[-9000:]
    return directory


@pytest.fixture(scope="module")
def untempered(forked_servers: None, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A second server, started with the exported model, which reports log-probs without the temperature."""
    (port,) = free_ports(1)
    options = ServerOptions(model=exported, port=port, dtype="fp32", max_total_tokens=1024, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        server = Server(options, tmp_path_factory.mktemp("logs") / "fresh.log")
    try:
        server.wait_ready(300.0)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def fresh_checksum(untempered: Server) -> str:
    """The checksum of a server that was started with the exported model and never updated."""
    return str(ask(untempered, lambda c: c.weights_checksum()))


def push(
    forks: Forks,
    trained: Path,
    server: Server,
    layout: str,
    route: str = "collective",
    mutation: str = "none",
    temperature: float = 1.0,
    stress: str = '{"kind": "none"}',
) -> Run:
    ranks = 4 if layout.count("=2") > 1 and "cp" not in layout else 2
    arguments = ("push", trained, server.url, layout, route, mutation, str(temperature), stress)
    return forks.run(SUPPORT / "sync_worker.py", *arguments, ranks=ranks, together=True)


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
    ("layout", "route", "temperature"),
    [
        ("tp=2", "collective", 0.5),
        ("pp=2", "disk", 1.0),
        ("tp=2,pp=2,ep=2", "collective", 1.7),
        ("tp=2,pp=2,ep=2", "ipc", 1.0),
    ],
)
def test_a_weight_sync_delivers_the_trained_weights(
    forks: Forks, trained: Path, tiny_server: Server, fresh_checksum: str, layout: str, route: str, temperature: float
) -> None:
    done = push(forks, trained, tiny_server, layout, route, temperature=temperature)
    assert done.returncode == 0, done.stderr[-9000:]
    assert ask(tiny_server, lambda c: c.weights_checksum()) == fresh_checksum
    served = ask(tiny_server, lambda c: c.score(TOKENS))
    np.testing.assert_allclose(served, reference_logprobs(trained, TOKENS).numpy(), rtol=0, atol=1e-5)
    assert ask(tiny_server, lambda c: c.model_info())["weight_version"] == "7"


@pytest.mark.parametrize("mutation", ["swap", "skip"])
def test_a_faulty_weight_sync_is_detected(
    forks: Forks, trained: Path, tiny_server: Server, fresh_checksum: str, mutation: str
) -> None:
    done = push(forks, trained, tiny_server, "ep=2", mutation=mutation)
    assert done.returncode != 0
    assert "log-probs of the probe differ from the trainer's" in done.stderr
    assert ask(tiny_server, lambda c: c.weights_checksum()) != fresh_checksum


@pytest.mark.parametrize(
    ("layout", "route", "stress"),
    [
        ("tp=2", "disk", '{"kind": "fp8"}'),
        ("tp=2,pp=2,ep=2", "collective", '{"kind": "int4"}'),
        ("tp=2", "ipc", '{"kind": "fp8"}'),
    ],
)
def test_a_server_gets_the_stressed_weights_by_each_route(
    forks: Forks, trained: Path, tiny_server: Server, tmp_path: Path, layout: str, route: str, stress: str
) -> None:
    """The sync's own verification compares the server with the trainer under the stressed weights, to 1e-5."""
    done = push(forks, trained, tiny_server, layout, route, stress=stress)
    assert done.returncode == 0, done.stderr[-9000:]
    numbers, rows = (integers(4), 1) if "int4" in stress else (e4m3_numbers(), 128)
    reference = copy_changed(trained, tmp_path / "stressed", lambda weight: rounded(weight, numbers, rows, 128))
    served = ask(tiny_server, lambda c: c.score(TOKENS))
    np.testing.assert_allclose(served, reference_logprobs(reference, TOKENS).numpy(), rtol=0, atol=1e-5)
    assert np.abs(served - reference_logprobs(trained, TOKENS).numpy()).max() > 0.01
    (report,) = map(json.loads, re.findall(r"\{[^{}]*bytes[^{}]*\}", done.stdout))  # ranks print at the same time
    assert 0.02 < report["weights/stress/relative_error"] < 0.15
    assert report["weights/probe_max_abs_diff"] < 1e-5


def test_weights_of_a_model_with_another_shape_are_detected(forks: Forks, tiny_server: Server, tmp_path: Path) -> None:
    """SGLang skips weights with unknown names and reports success."""
    deeper = make_tiny_model(tmp_path / "deeper", num_layers=3, seed=1)
    done = push(forks, deeper, tiny_server, "tp=2")
    assert done.returncode != 0
    assert f"{tiny_server.url}: log-probs of the probe differ from the trainer's" in done.stderr
    assert "does it serve a model of another shape than model.path?" in done.stderr


def test_a_server_whose_log_probs_differ_from_its_sampling_is_detected(
    forks: Forks, trained: Path, untempered: Server
) -> None:
    done = push(forks, trained, untempered, "tp=2", route="disk", temperature=0.5)
    assert done.returncode != 0
    assert f"{untempered.url}: log-probs of what it sampled at rollout.temperature 0.5 differ from" in done.stderr
