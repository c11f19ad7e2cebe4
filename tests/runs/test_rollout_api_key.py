"""The key of servers that run elsewhere: the servers get it, and no file or output of a run contains it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from config_files import ARCHITECTURE, write, write_model
from forks import Forks, Run

from megatron_rl.parity import _compare_server
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.pool import read_api_key, wait_for_servers
from megatron_rl.rollout.server import ServerError, free_ports
from megatron_rl.rollout.server_needs import CheckFailed, Needs

VARIABLE, KEY = "MEGATRON_RL_TEST_KEY", "a-key-that-nothing-else-contains"


class Refuses(BaseHTTPRequestHandler):
    """Records the key of each request, and refuses the request."""

    keys: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_error(418, explain=f"your key was {self.headers['Authorization']}")

    do_POST = do_GET


@pytest.fixture
def server() -> Iterator[str]:
    Refuses.keys.clear()
    with HTTPServer(("127.0.0.1", 0), Refuses) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def train(forks: Forks, directory: Path, url: str, model: Path, *options: str, **variables: str) -> Run:
    write(
        directory / "a.yaml",
        f"""
run_dir: run
model: {{path: {model}}}
engine: {{device: cpu, dtype: fp32}}
data: {{train: "arithmetic:terms=2,split=train,count=8", max_prompt_tokens: 16}}
rollout:
  prompts_per_step: 4
  max_response_tokens: 16
  servers: {{urls: ["{url}"], api_key_env: {VARIABLE}}}
train: {{steps: 1}}
""",
    )
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    command = ("-m", "megatron_rl", "train", "a.yaml", *options)
    return forks.run(*command, directory=directory, environment={**one_rank, **variables})


def test_the_key_is_sent_to_the_servers_and_appears_nowhere_else(
    forks: Forks, server: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = train(forks, tmp_path, server, tiny_model_dir, **{VARIABLE: KEY})
    assert f"error: {server}/model_info: status 418" in done.stderr, done.stderr[-3000:]
    assert Refuses.keys == [f"Bearer {KEY}"]
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in written if KEY.encode() in file.read_bytes()]
    assert KEY not in done.stdout + done.stderr

    shown = train(forks, tmp_path, server, tiny_model_dir, "--dry-run", **{VARIABLE: KEY})
    assert shown.returncode == 0
    assert f"api_key_env: {VARIABLE}" in shown.stdout
    assert KEY not in shown.stdout + shown.stderr


@pytest.mark.parametrize("variables", [{}, {VARIABLE: ""}])
def test_an_unset_key_variable_is_an_error_before_the_run_directory_is_made(
    forks: Forks, tiny_model_dir: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    done = train(forks, tmp_path, "http://127.0.0.1:1", tiny_model_dir, **variables)
    assert done.returncode == 2
    assert f"error: rollout.servers.api_key_env: the environment variable {VARIABLE} is not set" in done.stderr
    assert not (tmp_path / "run").exists()


def test_whitespace_around_a_key_is_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" {KEY}\r\n")
    assert read_api_key(VARIABLE, "--api-key-env") == KEY


@pytest.mark.parametrize("odd", ["\n", "\t", " ", "é", "\x7f", "\u2028"])
def test_a_key_that_is_invalid_in_a_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    monkeypatch.setenv(VARIABLE, f"hidden{odd}secret")
    with pytest.raises(ServerError, match=f"--api-key-env: character 7 of the key in the .* {VARIABLE} is a") as caught:
        read_api_key(VARIABLE, "--api-key-env")
    assert "hidden" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_parity_sends_the_key_and_hides_it_if_the_server_echoes_it(server: str) -> None:
    with pytest.raises(RolloutError, match="status 418") as caught:
        _compare_server(server, KEY, [[1, 2]], [[-1.0]])
    assert Refuses.keys == [f"Bearer {KEY}"]
    assert "your key was Bearer ***" in str(caught.value)
    assert KEY not in str(caught.value)


class Repeats(Refuses):
    """Answers with content type `kind` and body `content`; KEY in them is replaced by the request's key."""

    status, kind, content = 200, "", ""

    def do_GET(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        content = self.content.replace("KEY", key).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind.replace("KEY", key))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [
        (200, "text/html", "KEY"),
        (200, "KEY", "{}"),
        (200, "text/html", 190 * " " + "KEY"),  # the message is cut within the key
        (200, "application/json", "KEY"),
        (200, "application/json", '{"success": false, "message": "KEY"}'),
        (418, "text/html", "KEY"),
        (418, "text/html", 490 * " " + "KEY"),
    ],
)
def test_errors_hide_a_key_that_the_server_echoes(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: str, content: str
) -> None:
    for name, value in (("status", status), ("kind", kind), ("content", content)):
        monkeypatch.setattr(Repeats, name, value)

    async def ask(url: str) -> None:
        async with SGLangClient(url, api_key=KEY) as client:
            await client.model_info()

    with HTTPServer(("127.0.0.1", 0), Repeats) as listening:
        Thread(target=listening.handle_request, daemon=True).start()
        with pytest.raises(RolloutError, match=r"\*\*\*") as caught:
            asyncio.run(ask(f"http://127.0.0.1:{listening.server_port}"))
    assert KEY[:8] not in str(caught.value)


# ---- waiting for servers


class Answers(BaseHTTPRequestHandler):
    """Answers /model_info like SGLang, with `model_type` as the type of the model, and /server_info."""

    model_type = "qwen3_moe"
    settings: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        answer = self.settings if self.path == "/server_info" else {"model_type": self.model_type}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def needs(tmp_path: Path) -> Needs:
    return Needs(model=write_model(tmp_path / "model"), arch=ARCHITECTURE, max_tokens=100)


def wait(urls: list[str], needs: Needs, seconds: float = 20.0) -> list[str]:
    """Waits for the servers; returns what was printed meanwhile."""
    said: list[str] = []
    asyncio.run(wait_for_servers(urls, KEY, seconds, needs, said.append))
    return said


def serve(listening: HTTPServer) -> None:
    """Answers two requests: what is the model, and what are the settings."""
    for _ in range(2):
        listening.handle_request()


def test_waiting_for_a_server_prints_one_line(needs: Needs) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"

    def start_late() -> None:
        time.sleep(2.5)
        with HTTPServer(("127.0.0.1", port), Answers) as listening:
            serve(listening)

    late = Thread(target=start_late)
    late.start()
    assert wait([url], needs) == [f"waiting up to 20 s for the rollout server at {url}"]
    late.join()


def test_the_error_for_a_server_that_never_starts_names_the_server(needs: Needs) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(
        ServerError, match=rf"{url}/model_info: ConnectError .*; rollout.servers.start_timeout, 1 s, has"
    ):
        wait([url], needs, seconds=1.0)


def test_a_server_that_takes_connections_and_never_answers_is_given_up_in_time(needs: Needs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(ServerError, match=f"{url}/model_info: no answer within .*start_timeout, 2 s, has passed"):
            wait([url], needs, seconds=2.0)
        assert time.monotonic() - begun < 6


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dp_size": 2}, "dp_size is 2"),
        ({"max_req_input_len": 95, "max_total_num_tokens": 4096}, "may have 99 tokens, but .* is 100"),
    ],
)
def test_a_server_that_lacks_what_the_run_needs_is_refused_before_it_is_used(
    needs: Needs, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], told: str
) -> None:
    monkeypatch.setattr(Answers, "settings", settings)
    with HTTPServer(("127.0.0.1", 0), Answers) as listening:
        Thread(target=serve, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_port}"
        with pytest.raises(CheckFailed, match=f"{url}: .*{told}"):
            wait([url], needs)


def test_a_wrong_answer_ends_the_wait_for_servers_at_once(
    server: str, needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = f"http://127.0.0.1:{free_ports(1)[0]}"
    start = time.monotonic()
    with pytest.raises(RolloutError, match=f"{server}/model_info: status 418"):
        wait([missing, server], needs)
    monkeypatch.setattr(Answers, "model_type", "llama")
    with HTTPServer(("127.0.0.1", 0), Answers) as other:
        Thread(target=serve, args=(other,), daemon=True).start()
        with pytest.raises(CheckFailed, match=r"serves a llama, but .*model is a qwen3_moe; start it with that model"):
            wait([missing, f"http://127.0.0.1:{other.server_port}"], needs)
    assert time.monotonic() - start < 20.0
