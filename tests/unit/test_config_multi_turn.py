"""Keys that an environment of several turns excludes."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config


def check(tmp_path: Path, overrides: str) -> None:
    check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split()), ARCHITECTURE, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.chat_template=true", "data.chat_template: true, but rollout.environment makes the prompt's messages"),
        (
            "rollout.replay_from=r",
            "rollout.environment: does nothing under rollout.replay_from, which uses no servers; set it to null",
        ),
    ],
)
def test_a_contradiction_is_one_line(tmp_path: Path, overrides: str, message: str) -> None:
    check(tmp_path, overrides)
    check(tmp_path, "rollout.environment.name=calculator")
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, f"rollout.environment.name=calculator {overrides}")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message)
