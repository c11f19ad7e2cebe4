"""megatron-rl doctor against real servers, healthy and faulty, and against what is no server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_options import options
from tiny_models import VOCAB_SIZE, make_tiny_model

from megatron_rl.doctor import examine
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server import Server, free_ports

pytestmark = pytest.mark.server
KEY, VARIABLE = "a-key-of-this-test", "DOCTOR_TEST_KEY"
CHANGES = {"weight version", "pause and flush", "abort", "update from disk", "update by broadcast"}


def write_config(directory: Path, model: Path, *, replay: str = "none", tokens: int = 32, route: str = "disk") -> Path:
    path = directory / "run.yaml"
    path.write_text(
        f"run_dir: {directory / 'run'}\nmodel: {{path: {model}}}\ndata: {{train: unused, max_prompt_tokens: 16}}\n"
        f"rollout: {{max_response_tokens: {tokens}}}\nrouting: {{replay: {replay}}}\nweights: {{route: {route}}}\n"
        "train: {steps: 1}\n"
    )
    return path


def examined(
    capsys: pytest.CaptureFixture[str], url: str, model: Path | None = None, config: Path | None = None, key: str = ""
) -> tuple[int, dict[str, str], dict[str, str]]:
    """Returns exit status, state by check, and text by check."""
    status = examine.run([url], model, config, key or None)
    lines = re.findall(r"^  (ok|fail|unknown) +([^:]+): (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len({name for _, name, _ in lines}) == len(lines)
    return status, {name: state for state, name, _ in lines}, {name: text for _, name, text in lines}


def only_failure(result: tuple[int, dict[str, str], dict[str, str]]) -> tuple[str, str]:
    """Returns name and text of the only check that failed."""
    status, states, texts = result
    failed = [(name, texts[name]) for name, state in states.items() if state == "fail"]
    assert (status, len(failed)) == (2, 1), failed
    return failed[0]


@pytest.fixture(scope="module")
def guarded(forked_servers: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, a KV cache of 256 tokens, and routes."""
    server = Server(
        options(tiny_model_dir, dtype="fp32", max_total_tokens=256, api_key=KEY, return_routed_experts=True),
        tmp_path_factory.mktemp("guarded") / "server.log",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        try:
            server.wait_ready(120.0)
            yield server
        finally:
            server.stop()


def test_a_healthy_server_passes_all_checks_and_is_left_as_it_was(
    served: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def state() -> tuple[str, str]:
        async with SGLangClient(served, deadline=20.0) as client:
            return await client.weights_checksum(), (await client.model_info())["weight_version"]

    before = asyncio.run(state())
    status, states, texts = examined(capsys, served, config=write_config(tmp_path, tiny_model_dir))
    assert status == 0, texts
    assert set(states.values()) == {"ok"}
    assert states.keys() > CHANGES | {"model", "parallelism", "sampled log-probs", "put back"}
    assert "a tensor" in texts["update by broadcast"]
    assert asyncio.run(state()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_missing_routes_fail_if_the_run_replays_them_and_are_unknown_without_a_run(
    served: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model_dir, replay="r3")
    name, text = only_failure(examined(capsys, served, config=config))
    assert name == "routed experts"
    assert "start it with --enable-return-routed-experts" in text
    status, states, texts = examined(capsys, served, model=tiny_model_dir)
    assert (status, states["routed experts"]) == (0, "unknown")
    assert "--enable-return-routed-experts" in texts["routed experts"]


def test_another_model_fails_and_the_layers_are_named(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", num_layers=3)
    name, text = only_failure(examined(capsys, served, model=other))
    assert name == "model"
    assert "num_layers 2, not 3" in text
    assert f"--model-path {other}" in text


def test_a_context_that_would_cut_responses_fails(
    served: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model_dir, tokens=500)
    name, text = only_failure(examined(capsys, served, config=config))
    assert name == "longest request"
    assert "may have 510 tokens" in text
    assert "--context-length 518" in text


@pytest.mark.slow
def test_a_directory_that_the_server_does_not_see_fails_for_the_route_disk(
    served: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def elsewhere(client: SGLangClient, path: str, *, weight_version: int) -> None:
        await real(client, "/not/mounted/" + path, weight_version=weight_version)

    real = SGLangClient.update_weights_from_disk
    monkeypatch.setattr(SGLangClient, "update_weights_from_disk", elsewhere)
    name, text = only_failure(examined(capsys, served, config=write_config(tmp_path, tiny_model_dir)))
    assert name == "update from disk"
    assert f"does not see {tmp_path}" in text
    config = write_config(tmp_path, tiny_model_dir, route="collective")
    assert examined(capsys, served, config=config)[1]["update from disk"] == "ok"


def test_a_server_that_serves_others_is_not_paused(
    served: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = threading.Event()

    async def use() -> None:
        async def one(client: SGLangClient) -> None:
            while not ends.is_set():
                await client.generate([5, 6], max_new_tokens=300, temperature=1.0, vocab_size=VOCAB_SIZE, versions={0})

        async with SGLangClient(served) as client, asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(one(client))

    user = threading.Thread(target=lambda: asyncio.run(use()))
    user.start()
    try:
        time.sleep(0.5)
        status, states, _ = examined(capsys, served, model=tiny_model_dir)
    finally:
        ends.set()
        user.join()
    assert status == 0
    assert {name for name, state in states.items() if state == "unknown"} >= CHANGES
    assert states["speed"] == "ok"
    assert "put back" not in states


def test_a_server_that_wants_a_key_fails_alone_for_the_key(guarded: Server, capsys: pytest.CaptureFixture[str]) -> None:
    name, text = only_failure(examined(capsys, guarded.url))
    assert name == "authorised"
    assert "--api-key" in text


def test_a_small_kv_cache_fails_with_its_flag(
    guarded: Server, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model_dir, tokens=239, replay="r3")
    name, text = only_failure(examined(capsys, guarded.url, config=config, key=VARIABLE))
    assert name == "longest request"
    assert "may have 254 tokens" in text
    assert "--max-total-tokens 257" in text


@pytest.mark.slow
def test_the_longest_request_that_passes_is_answered_whole_and_one_token_more_is_cut(guarded: Server) -> None:
    async def finish(tokens: int) -> int:
        body = {"input_ids": [5] * 16, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(headers=headers, timeout=60.0) as http:
            return len((await http.post(f"{guarded.url}/generate", json=body)).json()["output_ids"])

    async def both() -> list[int]:
        return [await finish(tokens) for tokens in (254 - 16, 255 - 16)]

    assert asyncio.run(both()) == [238, 238]


def test_routes_of_the_models_shape_pass(
    guarded: Server, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model_dir, replay="r3")
    status, states, texts = examined(capsys, guarded.url, config=config, key=VARIABLE)
    assert status == 0, texts
    assert "2 layers and 2 experts" in texts["routed experts"]
    assert states["put back"] == "ok"
    other = make_tiny_model(tmp_path / "other", experts_per_token=3)
    name = [
        name for name, state in examined(capsys, guarded.url, other, config, VARIABLE)[1].items() if state == "fail"
    ]
    assert name == ["model", "routed experts"]


def test_a_server_that_is_hung_gives_one_line(
    guarded: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "DEADLINE", 1.0)
    os.killpg(guarded.pid, signal.SIGSTOP)
    try:
        name, text = only_failure(examined(capsys, guarded.url, key=VARIABLE))
    finally:
        os.killpg(guarded.pid, signal.SIGCONT)
    assert (name, "no answer within 1 s" in text) == ("answers", True)


def test_a_server_that_hangs_after_it_was_identified_gives_one_more_line(
    guarded: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(client: SGLangClient, ids: object) -> list[float]:
        os.killpg(guarded.pid, signal.SIGSTOP)
        return await real(client, ids)  # type: ignore[arg-type]

    real = SGLangClient.score
    monkeypatch.setattr(SGLangClient, "score", stop)
    monkeypatch.setattr(examine, "DEADLINE", 1.0)
    try:
        name, text = only_failure(examined(capsys, guarded.url, key=VARIABLE))
    finally:
        os.killpg(guarded.pid, signal.SIGCONT)
    assert (name, "generate: no answer within 1 s" in text) == ("answers", True), text


def test_what_is_not_sglang_and_a_dead_port_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, dead = free_ports(2)
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    plain = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        name, text = only_failure(examined(capsys, url))
        assert (name, "status 404" in text) == ("SGLang", True)
    finally:
        plain.kill()
        plain.wait()
    start = time.monotonic()
    name, text = only_failure(examined(capsys, f"http://127.0.0.1:{dead}"))
    assert (name, "ConnectError" in text) == ("answers", True)
    assert time.monotonic() - start < 15


@pytest.mark.slow
def test_log_probs_of_another_temperature_fail_with_the_variable(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    server = Server(options(tiny_model_dir, dtype="fp32", max_total_tokens=4096), tmp_path / "server.log")
    try:
        server.wait_ready(240.0)
        name, text = only_failure(examined(capsys, server.url, model=tiny_model_dir))
        assert name == "sampled log-probs"
        assert "without SGLANG_RETURN_ORIGINAL_LOGPROB=1" in text
    finally:
        server.stop()
