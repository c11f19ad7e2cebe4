"""Contradictions of the masks by the sign of the advantage."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config

ICEPOP = "objective.correction.kind=icepop objective.correction.low=.5 objective.correction.high=2"


def check(tmp_path: Path, overrides: str) -> None:
    check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split()), ARCHITECTURE, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        f"{ICEPOP} objective.correction.negative_low=2",
        f"{ICEPOP} objective.correction.negative_low=3 objective.correction.negative_high=4",
    ],
)
def test_these_settings_agree(tmp_path: Path, overrides: str) -> None:
    check(tmp_path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            f"{ICEPOP} objective.correction.negative_low=3",
            "objective.correction.negative_low: 3.0 is above objective.correction.negative_high 2.0; one that is not",
        ),
        (
            f"{ICEPOP} objective.correction.negative_high=.25",
            "objective.correction.negative_low: 0.5 is above objective.correction.negative_high 0.25; one that is not",
        ),
    ],
)
def test_each_contradiction_gives_one_line(tmp_path: Path, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, overrides)
    (line,) = str(caught.value).splitlines()
    assert message in line
