"""The key of servers that run elsewhere: it reaches them, and nothing that a run writes or prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from config_files import write

from megatron_rl.config.schema import ServersConfig
from megatron_rl.rollout.pool import read_api_key
from megatron_rl.rollout.server import ServerError, free_ports

VARIABLE, KEY = "MEGATRON_RL_TEST_KEY", "a-key-that-nothing-else-contains"


class Refuses(BaseHTTPRequestHandler):
    """Takes down the key of each request, and refuses it."""

    keys: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_error(418)

    do_POST = do_GET


@pytest.fixture
def server() -> Iterator[str]:
    Refuses.keys.clear()
    with HTTPServer(("127.0.0.1", 0), Refuses) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def train(directory: Path, url: str, model: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
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
    others = {name: value for name, value in os.environ.items() if name != VARIABLE}
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl", "train", "a.yaml", *options],
        cwd=directory,
        env={**others, **one_rank, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_servers_are_sent_the_key_and_nothing_else_has_it(
    server: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    done = train(tmp_path, server, tiny_model_dir, **{VARIABLE: KEY})
    assert f"error: {server}/server_info: status 418" in done.stderr, done.stderr[-3000:]
    assert Refuses.keys == [f"Bearer {KEY}"]
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert tmp_path / "run" / "config.yaml" in written
    assert not [file for file in written if KEY.encode() in file.read_bytes()]
    assert KEY not in done.stdout + done.stderr

    shown = train(tmp_path, server, tiny_model_dir, "--dry-run", **{VARIABLE: KEY})
    assert shown.returncode == 0
    assert f"api_key_env: {VARIABLE}" in shown.stdout
    assert KEY not in shown.stdout + shown.stderr


@pytest.mark.parametrize("variables", [{}, {VARIABLE: ""}])
def test_a_variable_that_is_not_set_is_named_before_a_run_is_made(
    tiny_model_dir: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    done = train(tmp_path, "http://127.0.0.1:1", tiny_model_dir, **variables)
    assert done.returncode == 2
    assert f"error: rollout.servers.api_key_env: the environment variable {VARIABLE} is not set" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_variable_there_is_no_key() -> None:
    assert read_api_key(ServersConfig()) is None
    with pytest.raises(ServerError):
        read_api_key(ServersConfig(api_key_env=VARIABLE))
