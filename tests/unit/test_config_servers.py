"""Flags of the servers that the trainer starts: what it sets itself is refused, however it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write
from paths import ROOT

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.server_flags import TRAINERS_FLAGS, UNROUTED_FLAGS, WHOLE_FLAGS

OPTIONS_OF_SGLANG = """
import argparse, json, sys
from megatron_rl.rollout import sglang_cpu
sys.meta_path.append(sglang_cpu.Finder())
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps(sorted(parser._option_string_actions)))
"""


def told(tmp_path: Path, *flags: str) -> list[str]:
    config = load_config(Config, write(tmp_path / "a.yaml", RL), [f"rollout.servers.extra_flags={json.dumps(flags)}"])
    try:
        check_config(config, ARCHITECTURE, 1)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("flag", TRAINERS_FLAGS)
@pytest.mark.parametrize("form", ["two", "one"])
def test_what_the_trainer_sets_is_refused_without_its_value(tmp_path: Path, flag: str, form: str) -> None:
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
def test_an_abbreviation_is_refused_too(tmp_path: Path, given: str, flag: str) -> None:
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
def test_other_flags_go_to_the_server(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert told(tmp_path, *flags) == []


@pytest.mark.slow
@pytest.mark.server
def test_the_flags_are_those_of_sglang() -> None:
    """All are known there but `--tp`, itself an abbreviation; what begins one of them is listed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPTIONS_OF_SGLANG], env=environment, capture_output=True, text=True, check=True
    )
    known = set(json.loads(done.stdout.splitlines()[-1]))
    flags = {*TRAINERS_FLAGS, *UNROUTED_FLAGS}
    assert flags - known == {"--tp"}
    begun = {k for k in known for flag in flags if flag.startswith(k) and k != flag and k not in flags}
    assert begun == WHOLE_FLAGS
