"""Rollout servers: flags that the trainer sets are refused in any spelling, as are models that CPUs do not serve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from config_files import ARCHITECTURE, RL, write
from published_models import PUBLISHED

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.server_flags import TRAINERS_FLAGS
from megatron_rl.config.servers import read_urls
from megatron_rl.models.architecture import DeltaNet, LatentAttention
from megatron_rl.models.fields import ModelError
from megatron_rl.rollout.server import ServerError, ServerOptions, serve


def told(tmp_path: Path, *flags: str) -> list[str]:
    config = load_config(Config, write(tmp_path / "a.yaml", RL), [f"rollout.servers.extra_flags={json.dumps(flags)}"])
    try:
        check_config(config, ARCHITECTURE, 1)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("flag", TRAINERS_FLAGS)
@pytest.mark.parametrize("form", ["two", "one"])
def test_a_flag_that_the_trainer_sets_is_refused_and_its_value_is_hidden(tmp_path: Path, flag: str, form: str) -> None:
    lines = told(tmp_path, *((flag, "SECRET") if form == "two" else (f"{flag}=SECRET",)))
    assert f"rollout.servers.extra_flags: {flag} is not for you to set; {TRAINERS_FLAGS[flag]}" in lines
    assert "SECRET" not in "".join(lines)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ("--api-k=x", "--api-key"),
        ("--admin", "--admin-api-key"),
        ("--hos", "--host"),
        ("--random-se=1", "--random-seed"),
        ("--api_key", "--api-key"),
    ],
)
def test_an_abbreviation_of_such_a_flag_is_refused_too(tmp_path: Path, given: str, flag: str) -> None:
    (line,) = told(tmp_path, given)
    assert line.startswith(f"rollout.servers.extra_flags: {flag} is not for you to set; ")


@pytest.mark.parametrize(
    "flags",
    [
        ("--ep", "2"),
        ("--ep-size=2",),
        ("--base-gpu-id", "1"),
        ("--mem-fraction-static", "0.5"),
        ("--log-level", "info"),
    ],
)
def test_other_flags_are_passed_to_the_server(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert told(tmp_path, *flags) == []


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"latent": LatentAttention(8, 8, 4, 4, 4)}, "latent attention"),
        ({"delta_net": DeltaNet((0,), 2, 4, 8, 8, 4)}, "gated delta networks"),
        ({"sinks": True}, "sinks of attention"),
    ],
)
def test_servers_on_cpus_are_refused_what_they_do_not_compute(
    tmp_path: Path, changes: dict[str, Any], feature: str
) -> None:
    def rl(overrides: str) -> Config:
        return load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split())

    arch = dataclasses.replace(ARCHITECTURE, **changes)
    with pytest.raises(ConfigError, match=f"engine.device: cpu, but the model has {feature}, which SGLang does not"):
        check_config(rl("engine.device=cpu"), arch, 1)
    check_config(rl("engine.device=cpu rollout.servers.urls=[http://127.0.0.1:30000]"), arch, 1)
    check_config(rl("engine.device=cpu rollout.replay_from=runs/zero"), arch, 1)
    check_config(rl("engine.device=auto"), arch, 1)


def test_serve_refuses_what_sglang_would_not_serve_rightly(tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / "Qwen--Qwen3-Next-80B-A3B-Instruct.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published))
    options = ServerOptions(tmp_path, device="cpu")
    with pytest.raises(ServerError, match="the model has gated delta networks, which SGLang does not compute on CPUs"):
        serve(options)
    del published["full_attention_interval"]
    (tmp_path / "config.json").write_text(json.dumps({**published, "layer_types": ["linear_attention"] * 48}))
    with pytest.raises(ModelError, match=r"config\.json has no full_attention_interval, without which SGLang"):
        serve(options)


def test_a_long_sample_must_fit_the_cache_of_a_server_on_a_cpu(tmp_path: Path) -> None:
    """Its cache has a bound by default, which a GPU's has not."""
    arch = dataclasses.replace(ARCHITECTURE, max_position_embeddings=1 << 20)

    def check(*overrides: str) -> None:
        check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides), arch, 1)

    long = "rollout.max_response_tokens=65000"  # and a prompt of 1024
    for accepted in ("engine.device=cuda", "engine.device=auto"):
        check(long, accepted)
    check(long, "engine.device=cpu", "rollout.servers.max_total_tokens=66024")
    with pytest.raises(ConfigError, match=r"max_total_tokens: 65536 \(the default on a CPU\) is less than .* 66024"):
        check(long, "engine.device=cpu")


@pytest.mark.parametrize(
    ("text", "have_key", "message"),
    [
        ("", True, ": no URL is there; expected one such as http://host:30000 a line"),
        ("# nothing\n\n", True, ": no URL is there"),
        ("http://a:1\n\nhost:30000\n", True, ":3: expected a URL such as http://host:30000"),
        ("http://me:SECRET@a:1\n", True, ":1: expected a URL without credentials"),
        ("http://127.0.0.1:1\nhttp://a:1 # far\n", False, ":2: http://a:1 is on another machine; set rollout.servers"),
        ("http://a:1\nHTTP://A:1/\n", True, ":2: HTTP://A:1/ is there twice"),
    ],
)
def test_the_error_for_a_file_of_urls_names_its_line(tmp_path: Path, text: str, have_key: bool, message: str) -> None:
    (file := tmp_path / "urls").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_urls(file, have_key=have_key)
    assert f"rollout.servers.urls_file: {file}{message}" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_file_of_urls_is_checked_before_the_run(tmp_path: Path) -> None:
    def check(overrides: str) -> None:
        config = load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split())
        check_config(config, ARCHITECTURE, 1)

    with pytest.raises(ConfigError, match=r"rollout.servers.urls_file: .*gone: .*No such file"):
        check(f"rollout.servers.urls_file={tmp_path / 'gone'}")
    (file := tmp_path / "urls").write_text("http://127.0.0.1:1 # the first\nhttp://127.0.0.1:2\n")
    check(f"rollout.servers.urls_file={file}")
    with pytest.raises(ConfigError, match="urls and urls_file are both given"):
        check(f"rollout.servers.urls_file={file} rollout.servers.urls=[http://127.0.0.1:1]")
    with pytest.raises(ConfigError, match="launch and extra_flags are for servers"):
        check(f"rollout.servers.urls_file={file} rollout.servers.launch=2")
