"""Extra flags of rollout servers: flags that the trainer sets itself are refused in any spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.server_flags import TRAINERS_FLAGS


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
