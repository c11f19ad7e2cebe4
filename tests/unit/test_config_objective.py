"""Contradictions of the masks by sign and of score centering."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config

CENTRED = "presets=score_centering"
ICEPOP = "objective.correction.kind=icepop objective.correction.low=.5 objective.correction.high=2"


def check(tmp_path: Path, overrides: str) -> None:
    check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split()), ARCHITECTURE, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        f"{CENTRED} objective.centering.top_k=1024",
        f"{CENTRED} objective.correction.kind=tis objective.correction.high=2",
        f"{CENTRED} {ICEPOP} train.recompute_old_logprobs=false train.mini_batches=4",
        "presets=mimo objective.centering.top_k=128",
        f"{ICEPOP} objective.correction.negative_low=2",
        f"{ICEPOP} objective.correction.negative_low=3 objective.correction.negative_high=4",
    ],
)
def test_these_settings_agree(tmp_path: Path, overrides: str) -> None:
    check(tmp_path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (f"{CENTRED} objective.ratio=sequence", "objective.ratio: sequence, but objective.centering needs token"),
        (f"{CENTRED} objective.denominator=old", "objective.denominator: old, but objective.centering needs rollout"),
        (f"{CENTRED} objective.clip.kind=min", "objective.clip.kind: min, but objective.centering needs weight"),
        (f"{CENTRED} objective.router_shift=0.9", "objective.router_shift: 0.9, but objective.centering needs null"),
        (
            f"{CENTRED} objective.correction.kind=tis objective.correction.level=sequence objective.correction.high=2",
            "objective.correction.level: sequence, but objective.centering needs token",
        ),
        (
            f"{CENTRED} objective.correction.kind=sequence-mask objective.correction.delta=1",
            "objective.correction.kind: sequence-mask, but objective.centering needs none, icepop or tis",
        ),
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


def test_a_head_has_at_least_one_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.centering\.top_k: found 0, expected a value greater"):
        check(tmp_path, f"{CENTRED} objective.centering.top_k=0")
