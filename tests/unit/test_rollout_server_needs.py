"""What doctor makes of a server's own description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.sources import ConfigError
from megatron_rl.doctor.broadcast import broadcast
from megatron_rl.doctor.examine import run
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server_needs import (
    CannotTell,
    CheckFailed,
    Needs,
    check_lengths,
    check_parallelism,
    check_same_model,
)


@pytest.mark.parametrize(("name", "flag"), [("pp_size", "--pp-size 1"), ("dp_size", "--dp-size 1")])
def test_pipeline_stages_and_replicas_fail_with_their_flag(name: str, flag: str) -> None:
    with pytest.raises(CheckFailed, match=f"{name} is 2, .* start it with {flag}"):
        check_parallelism({"tp_size": 4, name: 2})
    assert check_parallelism({"tp_size": 4}) == "tp_size 4, pp_size 1, dp_size 1"


def test_what_is_not_known_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    with pytest.raises(CannotTell, match="neither max_req_input_len nor"):
        check_lengths({}, Needs(max_tokens=100))
    with pytest.raises(CannotTell, match="give --config"):
        check_lengths({"max_req_input_len": 506, "max_total_num_tokens": 8192}, Needs())
    with pytest.raises(CannotTell, match="give --model or --config"):
        check_same_model({"model_path": str(tmp_path), "model_type": "qwen3_moe"}, Needs())


def test_an_update_is_not_tried_on_quantised_weights() -> None:
    async def open_client() -> SGLangClient:
        return SGLangClient("http://127.0.0.1:9")

    loop = BackgroundLoop()
    info: dict[str, Any] = {"quantization": "fp8", "device": "cpu", "tp_size": 1}
    try:
        with pytest.raises(CannotTell, match=r"quantised \(fp8\)"):
            broadcast(loop.run(open_client()), loop, info, 0, 1.0)
    finally:
        loop.close()


@pytest.mark.parametrize("url", ["host:30000", "http://user:secret@host:1", "ftp://host"])
def test_a_server_that_is_no_url_is_one_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--server: expected a URL") as caught:
        run([url], None, None, None)
    assert "secret" not in str(caught.value)


def test_no_server_at_all_is_one_error() -> None:
    with pytest.raises(ConfigError, match="--server: no server is given"):
        run([], None, None, None)
