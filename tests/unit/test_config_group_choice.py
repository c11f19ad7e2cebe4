"""Contradictions between rollout.over_sampling and other keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config


def told(tmp_path: Path, overrides: str) -> list[str]:
    try:
        check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split()), ARCHITECTURE, 1)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("overrides", "told_how"),
    [
        ("over_sampling=1.5", "1.5, but with rollout.lag 0 .* raise lag to 1, or set over_sampling to null"),
        ("over_sampling=2.5 rollout.lag=1", "2.5, but .* raise lag to 2, or lower over_sampling to 2"),
        ("over_sampling=2 rollout.replay_from=r", "2.0 does nothing under rollout.replay_from"),
    ],
)
def test_over_sampling_is_bounded_by_the_lag(tmp_path: Path, overrides: str, told_how: str) -> None:
    (line,) = told(tmp_path, f"rollout.{overrides}")
    assert re.match(f"rollout.over_sampling: {told_how}", line)


def test_as_many_prompts_as_the_steps_within_the_lag_take_may_be_in_flight(tmp_path: Path) -> None:
    assert told(tmp_path, "rollout.lag=2 rollout.over_sampling=3") == []
